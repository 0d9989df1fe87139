"""``adsc train``: an adapter for a schedule, by a YAML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add ``train`` and its options to the commands."""
    parser = commands.add_parser(
        "train",
        help="train a LoRA adapter under a schedule",
        description="Train a LoRA adapter for a schedule on conversations in LLaVA's JSON format, "
        "as docs/training.md describes the YAML file. The same command goes on with a run that was "
        "interrupted; `torchrun -m adsc_kernels.cli train` uses several GPUs.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> None:
    """Train, and print where the adapter is; ``ValueError`` or ``OSError`` for bad input."""
    from adsc_kernels.training.config import TrainConfig

    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401

        config = TrainConfig.from_file(args.config)
    except ImportError as error:
        raise ValueError(f"training needs the extra `train` ({error})") from None
    except TypeError as error:
        raise ValueError(f"--config {args.config}: {error}") from None
    from adsc_kernels.training.run import train

    try:
        print(train(config))
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
