"""The command line, ``adsc``. Commands import torch and transformers themselves, when they run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from adsc_kernels.cli import account, bench, doctor, eval, merge, plan, run, train, visualize
from adsc_kernels.errors import UnsupportedError

UNWRITTEN = 1
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is there for ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (--help says more)\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import adsc_kernels

        print(f"adsc {adsc_kernels.__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = _Parser(
        prog="adsc", description="Uniform vision-token compression (ADSC) for multimodal LLMs."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print it and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run.add_parser(commands)
    account.add_parser(commands)
    plan.add_parser(commands)
    visualize.add_parser(commands)
    train.add_parser(commands)
    eval.add_parser(commands)
    merge.add_parser(commands)
    bench.add_parser(commands)
    doctor.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where its output can't be written, 2 for bad
    input, 130 for Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    if sys.stdout is None:  # closed by the caller, as in `adsc plan >&-`
        return _refuse(args.command, "error: stdout is closed", UNWRITTEN)
    try:
        if hasattr(sys.stdout, "reconfigure"):  # a model may answer in any script
            sys.stdout.reconfigure(errors="replace")
        args.execute(args)
    except BrokenPipeError:
        return _lost_stdout()
    except KeyboardInterrupt:
        return _refuse(args.command, "interrupted", INTERRUPTED)
    except MemoryError:
        return _refuse(args.command, "error: out of memory", BAD_INPUT)
    except (ValueError, OSError, UnsupportedError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        return _refuse(args.command, f"error: {message}", BAD_INPUT)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _lost_stdout()
    except OSError as error:  # a full disk
        _lost_stdout()
        return _refuse(args.command, f"error: stdout: {error.strerror}", UNWRITTEN)
    return 0


def _refuse(command: str, message: str, status: int) -> int:
    if sys.stderr is not None:
        print(f"adsc {command}: {message}", file=sys.stderr)
    return status


def _lost_stdout() -> int:
    """The reader went away (`adsc plan | head`). Point stdout elsewhere, or Python complains once
    more when it flushes on exit.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNWRITTEN
