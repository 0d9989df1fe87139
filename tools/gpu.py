"""`make gpu-test`, `gpu-sanitize`, `gpu-bench`: build for the GPU that is here, run, write JSON.

    python3 tools/gpu.py test|sanitize|bench [--only WORD]

Takes the Python, torch and nvcc that it finds and makes no environment of its own. Every job is a
process of its own, so that an illegal access in one kernel ends that job and no other; none starts
once the time is up. Where there is no CUDA device it says so, runs nothing and exits with 0; where
there is a GPU that torch can't use, or no torch to ask, it exits with 1.

Writes gpu-test.json (gpu-sanitize.json, gpu-bench.json) and a log beside it to the folder that
ADSC_OUT names (out/), and prints a short table last. ADSC_COMMIT names the commit where there is
no .git. ADSC_GPU_DRY_RUN=1 runs the very same files on CPU tensors, tiny, with nothing built: a
check of the files, whose JSON says so and is no result of a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 460  # for everything: a call on a lent machine is cut off a little later
BACKENDS = ("cuda", "triton")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Seconds after which no case begins.
BENCHES = {"downsample": 90, "boundary": 120, "compact": 110, "compress": 60}
DRY_RUN = os.environ.get("ADSC_GPU_DRY_RUN") == "1"


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


# ---- The jobs of each target ----


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def test_jobs(folder: Path, only: str) -> list[Job]:
    """One for each test file and backend; in a dry run one for all files."""
    files = [f for f in (ROOT / "python_tests" / "gpu").glob("test_*.py") if only in f.name]
    files.sort(key=lambda file: -file.stat().st_size)  # about the order of their times
    groups = [files] if DRY_RUN else [[file] for file in files]
    jobs = []
    for number, group in enumerate(groups):
        for backend in ("cpu",) if DRY_RUN else BACKENDS:
            xml = folder / f"{number}-{backend}.xml"
            pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junit-xml", xml)
            jobs.append(
                Job(
                    f"{'all files' if DRY_RUN else group[0].stem.removeprefix('test_')}, {backend}",
                    python(*pytest, *group),
                    lambda status, _, xml=xml: read_junit(status, xml),
                    {"ADSC_GPU_TEST_BACKEND": backend},
                )
            )
    return jobs


def read_junit(status: int, file: Path) -> dict[str, Any]:
    passed, failures, skipped = 0, [], {}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = [part for part in case if part.tag in ("failure", "error")]
        skip = case.find("skipped")
        if bad:
            failures.append({"test": name, "message": (bad[0].get("message") or "")[:500]})
        elif skip is not None:
            reason = skip.get("message") or ""
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed += 1
    return {
        "ok": status == 0 and not failures and passed > 0,
        "passed": passed,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
    }


def sanitize_jobs(_: Path, only: str) -> list[Job]:
    """The same small selection under each tool, every tensor in an allocation of its own."""
    script = python("python_tests/gpu/sanitized.py")
    jobs = []
    for tool in SANITIZERS:
        for backend in ("cpu",) if DRY_RUN else BACKENDS:
            prefix = [sanitizer(), "--tool", tool, "--error-exitcode", "9"]
            prefix += ["--target-processes", "application-only"]
            jobs.append(
                Job(
                    f"{tool}, {backend}",
                    ([] if DRY_RUN else prefix) + [*script, backend],
                    read_sanitizer,
                    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                )
            )
    return [job for job in jobs if only in job.name][: 1 if DRY_RUN else None]


def sanitizer() -> str:
    """compute-sanitizer, which toolkits don't always put on the PATH."""
    beside = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or str((*beside, "compute-sanitizer")[0])


def read_sanitizer(status: int, output: str) -> dict[str, Any]:
    """The tool's last word, and what the script says it ran."""
    summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    calls = re.findall(r"^(\d+) calls", output, flags=re.MULTILINE)
    refused = re.findall(r"=+ ((?:Error|Internal).*)", output)
    return {
        "ok": status == 0 and bool(calls) and (DRY_RUN or bool(summaries)),
        "calls": int(calls[-1]) if calls else 0,
        "summary": summaries[-1] if summaries else "; ".join(refused[:2]) or f"status {status}",
    }


def bench_jobs(folder: Path, only: str) -> list[Job]:
    """One for each family of ops, one after the other."""
    jobs = []
    for name, seconds in BENCHES.items():
        file = folder / f"{name}.json"
        jobs.append(
            Job(
                name,
                python(f"bench/gpu_{name}.py", file, seconds),
                lambda status, _, file=file: {"ok": status == 0, **json.loads(file.read_text())},
            )
        )
    return [job for job in jobs if only in job.name]


# ---- The machine ----


def missing_device() -> str:
    """Why there is nothing to run on; empty where there is a device. Raises ImportError."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return ""


def build() -> None:
    """The native parts in place, for this device alone."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major == 9 else "")
    print(f"building for sm_{arch} ...", flush=True)
    subprocess.run(
        python("setup.py", "--quiet", "build_ext", "--inplace"),
        cwd=ROOT,
        env={**os.environ, "ADSC_CUDA": "1", "ADSC_CUDA_ARCHS": arch},
        check=True,
    )


def said_by(*command: str) -> str | None:
    """What a program prints, or None where it isn't there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def stamp() -> dict[str, Any]:
    """What the results depend on."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "dry_run": DRY_RUN,
        "device": "cpu (dry run)",
        "driver": None,
        "commit": os.environ.get("ADSC_COMMIT") or said_by("git", "rev-parse", "HEAD"),
        "changed_files": len((said_by("git", "status", "--porcelain", "-uno") or "").splitlines()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": (re.findall(r"release (\S+),", said_by("nvcc", "--version") or "") or [None])[0],
    }
    for package in ("triton", "transformers"):
        try:
            facts[package] = __import__(package).__version__
        except ImportError:
            facts[package] = None
    if not DRY_RUN:
        found = torch.cuda.get_device_properties(0)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts.update(
            device=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            l2_bytes=found.L2_cache_size,
            memory_bytes=found.total_memory,
            driver=said_by(*query),
        )
    return facts


# ---- What is printed last ----


def table(rows: list[list[object]]) -> str:
    """Columns under each other; the first row is the heading."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def print_tests(results: list[dict[str, Any]]) -> None:
    for job in results:
        for failure in job.get("failures", []):
            print(f"FAILED {failure['test']} [{job['name']}]: {failure['message'][:200]}")
        for reason, count in job.get("skipped", {}).items():
            print(f"skipped {count} [{job['name']}]: {reason}")
    rows: list[list[object]] = [["file, backend", "passed", "failed", "skipped", "s", ""]]
    for job in results:
        skipped = sum(job.get("skipped", {}).values())
        counts = [job.get("passed", 0), job.get("failed", 0), skipped, job.get("seconds", "-")]
        rows.append([job["name"], *counts, job.get("error", "" if job["ok"] else "failed")])
    print(table(rows))


def print_sanitizers(results: list[dict[str, Any]]) -> None:
    rows: list[list[object]] = [["tool, backend", "calls", "s", "summary"]]
    for job in results:
        said = job.get("error") or job.get("summary", "")
        rows.append([job["name"], job.get("calls", 0), job.get("seconds", "-"), said])
    print(table(rows))


def print_benches(results: list[dict[str, Any]]) -> None:
    """Microseconds as CUDA graphs, and how many times as long the others take as the first."""
    for job in results:
        if job.get("error"):
            print(f"{job['name']}: {job['error']}")
    rows: list[list[object]] = [["op", "case", "of copy", "contestants: µs in a graph (eager)"]]
    for case in (case for job in results for case in job.get("cases", [])):
        times = [
            f"{name} {t['graph_us']:.1f} ({t['eager_us']:.1f})" if "graph_us" in t else f"{name} !"
            for name, t in case["times"].items()
        ]
        share = case["share_of_copy"].get("cuda") or case["share_of_copy"].get("cpu") or 0
        rows.append([case["op"], case["case"], f"{share:.2f}", "  ".join(times)])
    print(table(rows))


TARGETS = {
    "test": (test_jobs, print_tests),
    "sanitize": (sanitize_jobs, print_sanitizers),
    "bench": (bench_jobs, print_benches),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a GPU target; see the head of this file.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--only", default="", help="only the jobs whose name has this in it")
    options = parser.parse_args()
    name = f"gpu-{options.target}"
    try:
        why = "" if DRY_RUN else missing_device()
    except ImportError as error:
        print(f"{name}: {sys.executable} can't import torch ({error}); nothing was run")
        return 1
    if why:
        print(f"{name}: {why}; nothing was run and no test counts as passed")
        return 1 if said_by("nvidia-smi", "-L") else 0  # a GPU that this torch can't use
    begin = time.monotonic()
    deadline = begin + SECONDS
    if not DRY_RUN:
        build()
    make_jobs, show = TARGETS[options.target]
    # Tests share the device, which is idle most of the time; what is timed has it for itself.
    together = 1 if options.target == "bench" or DRY_RUN else 4
    with tempfile.TemporaryDirectory() as folder:
        jobs = make_jobs(Path(folder), options.only)
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(lambda job: run(job, deadline), jobs))
    results = [job.result for job in jobs]
    ok = bool(results) and all(result["ok"] for result in results)

    out = Path(os.environ.get("ADSC_OUT") or ROOT / "out")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{'dry-run-' if DRY_RUN else ''}{name}.json"
    seconds = round(time.monotonic() - begin, 1)
    report = {"target": name, "ok": ok, "seconds": seconds, "stamp": stamp(), "jobs": results}
    file.write_text(json.dumps(report, indent=1) + "\n")
    log = "\n".join(f"==== {job.name}\n{job.output}" for job in jobs)
    file.with_suffix(".log").write_text(log)
    facts = report["stamp"]
    print(f"\n{name} on {facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    show(results)
    print(f"{'ok' if ok else 'NOT OK'}: {seconds} s; {file}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
