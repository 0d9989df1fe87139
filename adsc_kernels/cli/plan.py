"""``adsc plan``: what a schedule makes of a layout, stage by stage, before anything runs."""

from __future__ import annotations

import argparse
import json
from argparse import ArgumentTypeError
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from adsc_kernels import checks
from adsc_kernels.budget import PRESETS
from adsc_kernels.cli import options
from adsc_kernels.cli.options import DEFAULT_LAYERS, count, size
from adsc_kernels.cli.text import layer_range, table
from adsc_kernels.segment_table import COLUMNS

if TYPE_CHECKING:
    from adsc_kernels.plan import CompressionPlan
    from adsc_kernels.schedule import CompressionSchedule


def add_parser(commands: Any) -> None:
    """Add ``plan`` and its options to the commands."""
    parser = commands.add_parser(
        "plan",
        help="print the plan that a schedule makes for a batch",
        description="Print every stage of a batch: layers, rows, vision tokens, cu_seqlens, key "
        "lengths. The defaults are LLaVA-1.5-7B with one picture in a prompt of 677 tokens.",
    )
    parser.add_argument(
        "--schedule",
        required=True,
        metavar="TEXT|PRESET",
        help="LAYER:KEEP,...[@PATTERN][@POSITIONS] such as 8:1/4,16:1/4,24:1/4 or "
        f"8:1/2x1/2@grid, or one of {', '.join(PRESETS)}; an empty text drops nothing",
    )
    parser.add_argument(
        "--layers",
        type=count,
        metavar="N",
        help=f"decoder layers (a preset's own, else {DEFAULT_LAYERS})",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=count,
        nargs="+",
        default=[677],
        metavar="N",
        help="the length of each prompt, vision tokens counted (677)",
    )
    parser.add_argument(
        "--image-tokens",
        type=size,
        default=(576, 24, 24),
        metavar="N|HxW",
        help="one picture of so many tokens in every prompt; 0 for none (24x24)",
    )
    parser.add_argument(
        "--image-start", type=count, default=5, metavar="N", help="where that picture begins (5)"
    )
    parser.add_argument(
        "--span",
        type=_span,
        action="append",
        default=[],
        metavar="SEQUENCE:START:N|HxW",
        help="a picture at any place, in place of --image-tokens; may be repeated",
    )
    parser.add_argument(
        "--chunk",
        type=_chunk,
        action="append",
        default=[],
        metavar="BEGIN:END",
        help="run these positions only, with all before cached; once for each prompt",
    )
    parser.add_argument("--block-size", type=count, metavar="N", help="tokens in a cache block")
    parser.add_argument(
        "--align",
        choices=["block"],
        help="block: keep a few tokens more, so that every picture loses whole cache blocks "
        "(needs --block-size)",
    )
    parser.add_argument("--segments", action="store_true", help="print the segment tables too")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> None:
    """Print the plan; ``ValueError`` for a layout that can't be."""
    schedule = options.schedule(args.schedule, args.layers)
    if args.block_size is not None:
        checks.integer("block_size", args.block_size, 1)
    from adsc_kernels.plan import make_plan

    spans = args.span or _same_picture(args)
    plan = make_plan(
        schedule,
        [0, *accumulate(args.prompt_tokens)],
        spans,
        block_size=args.block_size,
        align=args.align,
        chunks=args.chunk or None,
    )
    report = describe(plan, schedule, spans, args.segments, args.align is not None)
    print(json.dumps(report, indent=1) if args.json else _as_text(report))


def describe(
    plan: CompressionPlan,
    schedule: CompressionSchedule,
    spans: list[tuple[int, ...]],
    segments: bool,
    aligned: bool,
) -> dict[str, Any]:
    """The plan as plain JSON types. ``vision_tokens`` are those of whole prompts, for each span."""
    more: dict[tuple[int, ...], int] = {
        (*rounded.span, rounded.stage): rounded.kept for rounded in plan.rounded
    }
    kept = [
        [
            more.get((*span[:3], stage), count)
            for stage, count in enumerate(schedule.kept(*span[2:]))
        ]
        for span in spans
    ]
    stages = []
    for index, stage in enumerate(plan.stages):
        layers = schedule.layers_of_stage(index)
        entry: dict[str, Any] = {
            "stage": index,
            "layers": list(layers),
            "rows": stage.num_tokens,
            "vision_tokens": [counts[index] for counts in kept],
            "seq_lens": list(stage.seq_lens),
            "cu_seqlens": stage.cu_seqlens.tolist(),
            "max_seqlen": stage.max_seqlen,
            "cached_lens": list(stage.cached_lens),
            "kv_lens": list(stage.kv_lens),
            "num_segments": len(stage.segments),
        }
        if plan.block_size is not None:
            entry["block_counts"] = list(stage.block_counts)
        if segments:
            entry["segments"] = stage.segments.tolist()
        stages.append(entry)
    report = {"schedule": schedule.to_dict(), "text": str(schedule), "stages": stages}
    if aligned:
        report["rounded"] = [rounded._asdict() for rounded in plan.rounded]
    return report


def _as_text(report: dict[str, Any]) -> str:
    stages = report["stages"]
    with_blocks = "block_counts" in stages[0]
    header = ["stage", "layers", "rows", "vision tokens", "cu_seqlens", "key lengths"]
    rows = [
        [
            str(stage["stage"]),
            layer_range(range(stage["layers"][0], stage["layers"][-1] + 1))
            if stage["layers"]
            else "none",
            str(stage["rows"]),
            _numbers(stage["vision_tokens"]),
            _numbers(stage["cu_seqlens"]),
            _numbers(stage["kv_lens"]),
            *([_numbers(stage["block_counts"])] if with_blocks else []),
        ]
        for stage in stages
    ]
    parts = [f"schedule {report['text'] or 'dense'}, {report['schedule']['num_layers']} layers"]
    parts.append(table(header + ["blocks"] * with_blocks, rows, left=2))
    if "rounded" in report:
        parts.append(_rounded(report["rounded"]))
    for stage in stages:
        if "segments" in stage:
            name = f"segments of stage {stage['stage']}"
            entries = [[str(n) for n in segment] for segment in stage["segments"]]
            parts.append(f"{name}\n{table(COLUMNS, entries, left=0)}")
    return "\n\n".join(parts)


def _rounded(roundings: list[dict[str, Any]]) -> str:
    if not roundings:
        return "rounded: nothing, every picture loses whole blocks as it is"
    header = ["rounded picture", "stage", "asked for", "kept"]
    rows = [
        [
            "{} tokens at {} of prompt {}".format(*reversed(entry["span"])),
            *(str(entry[name]) for name in ("stage", "wanted", "kept")),
        ]
        for entry in roundings
    ]
    return table(header, rows, left=1)


def _numbers(values: list[int], most: int = 6) -> str:
    shown = " ".join(map(str, values[:most]))
    return shown + (f" ... {values[-1]}" if len(values) > most else "") or "-"


def _same_picture(args: argparse.Namespace) -> list[tuple[int, ...]]:
    if args.image_tokens[0] == 0:
        return []
    return [(b, args.image_start, *args.image_tokens) for b in range(len(args.prompt_tokens))]


def _span(text: str) -> tuple[int, ...]:
    fields = text.split(":")
    if len(fields) != 3:
        got = checks.shown(text)
        raise ArgumentTypeError(f"expected SEQUENCE:START:LENGTH such as 0:5:24x24, got {got}")
    return (count(fields[0]), count(fields[1]), *size(fields[2]))


def _chunk(text: str) -> tuple[int, int]:
    begin, _, end = text.partition(":")
    return (count(begin), count(end))
