"""Processes that are run side by side until a deadline, and what becomes of each."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Job:
    """A process, and what becomes of it: `read` makes the result of its exit status and output."""

    name: str
    command: list[str]
    read: Callable[[int, str], dict[str, Any]]
    environment: dict[str, str] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    output: str = ""


def run(job: Job, deadline: float) -> None:
    """Fills in the job's result, whatever happens; a job that never starts has failed too."""
    begin = time.monotonic()
    if begin > deadline:
        job.result = {"name": job.name, "ok": False, "error": "not started: out of time"}
        return
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python_tests")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    environment.update(job.environment)
    print(f"{job.name} ...", flush=True)
    status, error = -1, ""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(
                job.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            status = process.wait(deadline - begin)
        except OSError as problem:
            error = f"not started: {problem}"
        except subprocess.TimeoutExpired:
            process.kill()
            status, error = process.wait(), "stopped: out of time"
        log.seek(0)
        job.output = log.read()
    try:
        job.result = {"name": job.name, **job.read(status, job.output)}
    except (OSError, ValueError, ElementTree.ParseError):  # nothing to be read: it died early
        last = (job.output.strip().splitlines() or [""])[-1]
        job.result = {"name": job.name, "ok": False, "error": f"exit status {status}: {last}"}
    if error:
        job.result.update(ok=False, error=error)
    job.result["seconds"] = round(time.monotonic() - begin, 1)


def run_all(jobs: Sequence[Job], deadline: float, together: int) -> Iterator[Job]:
    """Runs so many at once, in their order; each is handed over when it has ended."""
    with ThreadPoolExecutor(together) as pool:
        running = {pool.submit(run, job, deadline): job for job in jobs}
        for done in as_completed(running):
            done.result()
            yield running[done]
