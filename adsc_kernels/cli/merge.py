"""``adsc merge``: a checkpoint with an adapter in its weights, which other engines read too."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adsc_kernels.cli import options


def add_parser(commands: Any) -> None:
    """Add ``merge`` and its options to the commands."""
    parser = commands.add_parser(
        "merge",
        help="write a checkpoint with an adapter merged into it",
        description="Merge an adapter that `adsc train` made into the model's weights and write a "
        "checkpoint in Hugging Face format, with the adapter's schedule as `adsc_schedule` in its "
        "config.json, where vLLM's plug-in finds it.",
    )
    parser.add_argument("--adapter", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new one")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="(the bundled one)")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> None:
    """Print the folder and the schedule; ``ValueError`` or ``OSError`` for bad input."""
    from adsc_kernels.adapters import merge_checkpoint

    folder = options.model_folder(args.model)
    print(f"{args.out}, for {merge_checkpoint(folder, args.adapter, args.out)}")
