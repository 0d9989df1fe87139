"""The command line, ``adsc``. Commands import torch and transformers themselves, when they run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from adsc_kernels.cli import account, bench, doctor, plan, run, visualize
from adsc_kernels.errors import UnsupportedError

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is there for ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (--help says more)\n")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = _Parser(
        prog="adsc", description="Uniform vision-token compression (ADSC) for multimodal LLMs."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run.add_parser(commands)
    account.add_parser(commands)
    plan.add_parser(commands)
    visualize.add_parser(commands)
    bench.add_parser(commands)
    doctor.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        if hasattr(sys.stdout, "reconfigure"):  # a model may answer in any script
            sys.stdout.reconfigure(errors="replace")
        args.execute(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (`adsc plan | head`). Point stdout elsewhere, or Python complains
        # once more when it flushes on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"adsc {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, UnsupportedError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"adsc {args.command}: error: {message}", file=sys.stderr)
        return BAD_INPUT
    return 0
