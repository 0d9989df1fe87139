"""Runs pieces of code, each in a process of its own, which a trap may take down.

    ADSC_CHECK=1 python3 trapped.py < {"name": "code", ...} > {"name": [exit status, output], ...}

PyTorch is imported once; what is forked from here starts CUDA itself, and this process never does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import cases.segment_tables  # noqa: F401

# Imported here once, for all, as torch is.
import adsc_kernels  # noqa: F401

SECONDS = 100  # for each


def fork(code: str, output: Path) -> int:
    """The number of a process that runs the code, and writes all that it says to `output`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(SECONDS)
        log = os.open(output, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(log, stream)
        exec(compile(code, "trapped", "exec"), {"__name__": "trapped"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    waiting: list[tuple[str, str]] = list(json.load(sys.stdin).items())
    running: dict[int, tuple[str, Path]] = {}
    found: dict[str, tuple[int, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name, code = waiting.pop()
                log = Path(folder, str(len(waiting)))
                running[fork(code, log)] = name, log
            pid, status = os.wait()
            name, log = running.pop(pid)
            found[name] = os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
