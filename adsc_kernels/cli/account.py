"""``adsc account``: what schedules cost and save on a model, and which one meets a budget."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc_kernels.accounting import (
    CONVENTIONS,
    DEFAULT_CONVENTION,
    KV_BITS,
    MODELS,
    Account,
    ModelShape,
    account,
)
from adsc_kernels.budget import PRESETS, BudgetSearch, search
from adsc_kernels.cli import account_report, options, png
from adsc_kernels.cli.options import count, size
from adsc_kernels.schedule import PATTERNS, CompressionSchedule

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_MODEL = "llava-1.5-7b"


def add_parser(commands: Any) -> None:
    """Add ``account`` and its options to the commands."""
    parser = commands.add_parser(
        "account",
        help="what a schedule costs and saves, and which one meets a budget",
        description="MACs and cache bytes of a model under a schedule, beside the dense model: by "
        "stage, by part and in all, under a named convention. `--budget 192` finds the schedules "
        "that leave so many vision tokens on average. Nothing runs and nothing is downloaded, "
        "unless --model is an id on the hub.",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|FOLDER|ID",
        help=f"{', '.join(MODELS)}; a folder with a config.json; or an id on the hub "
        f"({DEFAULT_MODEL})",
    )
    which = parser.add_argument_group("schedule")
    which.add_argument(
        "--schedule",
        metavar="TEXT|PRESET",
        help=f"such as 8:1/4,16:1/4,24:1/4, or one of {', '.join(PRESETS)}",
    )
    which.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="TEXT|PRESET",
        help="several schedules, one line each",
    )
    which.add_argument(
        "--budget",
        type=options.tokens,
        metavar="TOKENS",
        help="find the schedules that average so many vision tokens over the layers, and account "
        "for the first (without any schedule: a third of the vision tokens)",
    )
    which.add_argument(
        "--boundaries", type=count, default=2, metavar="N", help="boundaries for the budget (2)"
    )
    which.add_argument(
        "--keep",
        nargs="+",
        metavar="SHARE",
        help="shares to choose from for the budget (1/2 1/3 1/4; under the grid pattern 1/2x1/2 "
        "1/2x1 1x1/2 1/3x1/3)",
    )
    which.add_argument(
        "--mixed", action="store_true", help="a share of its own for each boundary of the budget"
    )
    which.add_argument(
        "--first-layer", type=count, default=1, metavar="N", help="where a boundary may lie (1)"
    )
    which.add_argument(
        "--last-layer", type=count, metavar="N", help="where one may (the model's last)"
    )
    which.add_argument(
        "--align",
        type=count,
        default=1,
        metavar="N",
        help="for the budget, drop multiples of N tokens, such as a cache's block (1)",
    )
    which.add_argument(
        "--pattern", choices=PATTERNS, default=PATTERNS[0], help="for the budget (start)"
    )
    which.add_argument("--exact", action="store_true", help="an error where none meets the budget")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--text-tokens", type=count, default=101, metavar="N", help="(101)")
    prompt.add_argument(
        "--image-tokens",
        type=size,
        metavar="N|HxW",
        help="vision tokens in the decoder (what the model makes of its tiles)",
    )
    prompt.add_argument(
        "--tiles", type=count, metavar="N", help="pictures or crops through the tower (1)"
    )
    prompt.add_argument(
        "--decode", type=count, default=0, metavar="N", help="tokens decoded after the prompt (0)"
    )
    what = parser.add_argument_group("counting")
    what.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default=DEFAULT_CONVENTION,
        metavar="NAME",
        help=f"{', '.join(CONVENTIONS)} ({DEFAULT_CONVENTION})",
    )
    what.add_argument(
        "--conventions", action="store_true", help="the totals by every convention, with what it is"
    )
    what.add_argument("--kv-dtype", choices=KV_BITS, default="bfloat16", help="(bfloat16)")
    what.add_argument(
        "--kv-scale-bytes",
        type=count,
        default=0,
        metavar="N",
        help="scales beside each head's row of K and of V (0)",
    )
    what.add_argument(
        "--block-size", type=count, default=1, metavar="N", help="rows in a cache block (1)"
    )
    what.add_argument(
        "--compact-to",
        type=count,
        metavar="STAGE",
        help="after the prompt, give up the rows of earlier layers that this stage has dropped",
    )
    parser.add_argument("--layers", action="store_true", help="every layer, too")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PNG",
        help="draw tokens by layer, and MACs and cache by stage (needs matplotlib)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> None:
    """Print the account; ``ValueError`` or ``OSError`` for bad input."""
    if args.plot is not None:
        png.check(args.plot, "--plot")
    shape = _shape(args.model)
    tokens, grid = _vision(args, shape)

    def counted(schedule: CompressionSchedule, convention: str = args.convention) -> Account:
        return account(
            shape,
            schedule,
            args.text_tokens,
            tokens,
            args.decode,
            grid=grid,
            tiles=args.tiles,
            kv_dtype=args.kv_dtype,
            kv_scale_bytes=args.kv_scale_bytes,
            block_size=args.block_size,
            compact_to=args.compact_to if schedule.boundaries else None,
            convention=convention,
        )

    found, schedules = _schedules(args, shape, tokens, grid)
    dense = counted(CompressionSchedule.dense(shape.num_layers))
    accounts = [(schedule, counted(schedule)) for schedule in schedules]
    facts = account_report.describe(args.model, shape, args.text_tokens, dense, accounts, found)
    if args.conventions:
        facts["conventions"] = _by_convention(counted, shape, schedules)
    if args.plot is not None:
        from adsc_kernels.chart import draw

        named = [("dense", dense), *((str(s) or "dense", kept) for s, kept in accounts)]
        png.write(
            draw(named, f"{args.model}: {tokens} vision and {args.text_tokens} text"), args.plot
        )
        facts["plot"] = str(args.plot)
    print(json.dumps(facts, indent=1) if args.json else account_report.as_text(facts, args.layers))


def _shape(model: str) -> ModelShape:
    return ModelShape.preset(model) if model in MODELS else ModelShape.from_pretrained(model)


def _vision(args: argparse.Namespace, shape: ModelShape) -> tuple[int, tuple[int, int] | None]:
    """Vision tokens, and their grid where there is one."""
    if args.image_tokens is not None:
        tokens, *grid = args.image_tokens
        return tokens, (grid[0], grid[1]) if grid else None
    tower = shape.tower
    if tower is None or tower.grid is None or tower.tokens is None:
        raise ValueError(
            f"--image-tokens: expected a count or HEIGHTxWIDTH, since {args.model} has no fixed one"
        )
    tiles = 1 if args.tiles is None else args.tiles
    down, across = (side // tower.merge for side in tower.grid)
    return tower.tokens * tiles, (down, across) if tower.tokens * tiles == down * across else None


def _schedules(
    args: argparse.Namespace, shape: ModelShape, tokens: int, grid: tuple[int, int] | None
) -> tuple[BudgetSearch | None, list[CompressionSchedule]]:
    texts = [*([] if args.schedule is None else [args.schedule]), *args.compare]
    given = [options.schedule(text, shape.num_layers) for text in texts]
    if args.budget is None and given:
        return None, given
    found = search(
        Fraction(tokens, 3) if args.budget is None else args.budget,
        tokens,
        shape.num_layers,
        args.boundaries,
        keep=args.keep,
        mixed=args.mixed,
        first_layer=args.first_layer,
        last_layer=args.last_layer,
        block_size=args.align,
        exact=args.exact,
        pattern=args.pattern,
        grid=grid,
    )
    return found, [found.schedules[0], *given]


def _by_convention(
    counted: Callable[..., Account], shape: ModelShape, schedules: list[CompressionSchedule]
) -> list[dict[str, Any]]:
    dense = CompressionSchedule.dense(shape.num_layers)
    return [
        {
            "name": how.name,
            "definition": how.definition,
            "dense_macs": counted(dense, how.name).macs,
            "macs": [counted(schedule, how.name).macs for schedule in schedules],
        }
        for how in CONVENTIONS.values()
    ]
