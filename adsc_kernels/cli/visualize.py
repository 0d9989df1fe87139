"""``adsc visualize``: the patches of a picture that survive, by stage or by pattern."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc_kernels.budget import PRESETS
from adsc_kernels.cli import options, png
from adsc_kernels.cli.options import DEFAULT_LAYERS, count, size
from adsc_kernels.cli.text import layer_range, table
from adsc_kernels.schedule import PATTERNS, Boundary, CompressionSchedule

if TYPE_CHECKING:
    from adsc_kernels.coverage import Coverage

DEFAULT_OUT = "adsc-visualize.png"
STRIDES = (2, 3, 4)
MOST_PATCHES = 2**14  # the farthest patch is looked for among all, for each survivor
MOST_STAGES = 32  # panels beside one another
MEANINGS = {
    "start": "start, (j*n)//m in reading order: an even stride",
    "center": "center, ((2j+1)*n)//(2m) in reading order",
    "linspace": "linspace, first and last patch included",
    "grid": "grid: rows and columns thinned alike",
}


def add_parser(commands: Any) -> None:
    """Add ``visualize`` and its options to the commands."""
    parser = commands.add_parser(
        "visualize",
        help="draw which patches of a picture survive",
        description="Draw a picture's survivors: with --schedule stage by stage, without it a "
        "contact sheet that compares the patterns at strides of 2, 3 and 4. No model is read.",
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="(one that comes with the package)"
    )
    parser.add_argument(
        "--grid", type=size, default=(576, 24, 24), metavar="HxW", help="patches (24x24)"
    )
    parser.add_argument(
        "--schedule",
        metavar="TEXT|PRESET",
        help="such as 8:1/4,16:1/4@center, or one of " + ", ".join(PRESETS),
    )
    parser.add_argument(
        "--layers",
        type=count,
        metavar="N",
        help=f"decoder layers (a preset's own, else {DEFAULT_LAYERS})",
    )
    parser.add_argument(
        "--patterns",
        nargs="+",
        choices=PATTERNS,
        metavar="NAME",
        help=f"compare these on a contact sheet: {', '.join(PATTERNS)} (all, without --schedule)",
    )
    parser.add_argument(
        "--stretch",
        action="store_true",
        help="the model sees the whole picture, stretched to the grid (the centre is cut out)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(DEFAULT_OUT), metavar="PNG", help=f"({DEFAULT_OUT})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> None:
    """Draw the picture and print what is in it; ``ValueError`` or ``OSError`` for bad input."""
    png.check(args.out, "--out")
    if len(args.grid) != 3 or args.grid[0] == 0:
        raise ValueError("--grid: expected HEIGHTxWIDTH of at least 1x1, such as 24x24")
    if args.grid[0] > MOST_PATCHES:
        raise ValueError(f"--grid: expected at most {MOST_PATCHES} patches, got {args.grid[0]}")
    base = None if args.schedule is None else options.schedule(args.schedule, args.layers)
    if base is not None and base.num_stages > MOST_STAGES:
        raise ValueError(
            f"--schedule: expected at most {MOST_STAGES} stages to draw, got {base.num_stages}"
        )
    from adsc_kernels.hub import bundled_checkpoint
    from adsc_kernels.images import load_image

    grid = (args.grid[1], args.grid[2])
    pictures = bundled_checkpoint() / "pictures"
    image = load_image(min(pictures.glob("*.png")) if args.image is None else args.image)
    from adsc_kernels.coverage import coverage, under_pattern
    from adsc_kernels.picture import Panel, Strip, centre_box, draw

    box = (0, 0, *image.size) if args.stretch else centre_box(image.size, grid)
    patterns = args.patterns
    if base is not None and patterns is None:
        patterns = [base.pattern]
    facts, strips = [], []
    for pattern in options.progress(patterns or PATTERNS, "patterns"):
        if base is None:
            strides = [_one(Fraction(1, stride)) for stride in STRIDES]
            schedules = [under_pattern(one, pattern, grid) for one in strides]
            found = [coverage(schedule, grid)[-1] for schedule in schedules]
            names = [f"keep 1/{stride}" for stride in STRIDES]
        else:
            schedule = under_pattern(base, pattern, grid)
            schedules = [schedule] * schedule.num_stages
            found = coverage(schedule, grid)
            names = [
                f"stage {index}, layers {layer_range(schedule.layers_of_stage(index))}"
                for index in range(schedule.num_stages)
            ]
        panels = [
            Panel(f"{name}: {_caption(one, grid)}", one.kept)
            for name, one in zip(names, found, strict=True)
        ]
        heading = MEANINGS[pattern]
        if any(one.deletes_columns(grid) for one in found):
            heading += "; it deletes whole columns here"
        strips.append(Strip(image, box, grid, panels, heading))
        facts += [
            _fact(pattern, name, str(schedule), one, grid)
            for name, schedule, one in zip(names, schedules, found, strict=True)
        ]
    title = f"Patches that survive of {grid[0]} x {grid[1]}"
    title += f" under {base}" if base is not None and len(strips) == 1 else ""
    png.write(draw(strips, title), args.out)
    report = {"grid": list(grid), "panels": facts, "picture": str(args.out)}
    print(json.dumps(report, indent=1) if args.json else _as_text(report))


def _one(keep: Fraction) -> CompressionSchedule:
    return CompressionSchedule(1, (Boundary(0, keep),))


def _caption(found: Coverage, grid: tuple[int, int]) -> str:
    if found.deletes_columns(grid):
        return f"{len(found.kept)}, {grid[1] - found.columns} of {grid[1]} columns deleted"
    return f"{len(found.kept)} in {found.rows} rows, {found.columns} columns"


def _fact(
    pattern: str, name: str, schedule: str, found: Coverage, grid: tuple[int, int]
) -> dict[str, Any]:
    return {
        "pattern": pattern,
        "keep": name,
        "schedule": schedule,
        "tokens": len(found.kept),
        "rows": found.rows,
        "columns": found.columns,
        "deletes_columns": found.deletes_columns(grid),
        "farthest": round(found.farthest, 4) if found.kept else None,
        "kept": sorted(found.kept),
    }


def _as_text(report: dict[str, Any]) -> str:
    height, width = report["grid"]
    panels: Sequence[dict[str, Any]] = report["panels"]
    rows = [
        [
            one["pattern"],
            one["keep"],
            str(one["tokens"]),
            f"{one['rows']} of {height}",
            f"{one['columns']} of {width}",
            "-" if one["farthest"] is None else f"{one['farthest']:.2f}",
        ]
        for one in panels
    ]
    header = ["pattern", "", "tokens", "rows left", "columns left", "farthest"]
    parts = [
        table(header, rows, left=2),
        "farthest: from a patch to its nearest survivor, at most, in patches.",
    ]
    gone = [f"{one['pattern']} {one['keep']}" for one in panels if one["deletes_columns"]]
    if gone:
        parts.append(
            f"Whole columns are deleted, and no row, under {'; '.join(gone)}. A stride that "
            f"divides the width, {width}, meets the same columns in every row, and nothing is left "
            "of the others. `grid` thins rows and columns alike instead."
        )
    return "\n\n".join([*parts, f"drawn in {report['picture']}"])
