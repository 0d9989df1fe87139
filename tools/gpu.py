"""`make gpu-test`, `gpu-sanitize`, `gpu-bench`, `gpu-all`, `gpu-prebuild`: JSON about a GPU.

    python3 tools/gpu.py test|sanitize|bench|all|prebuild [--only WORD] [--seconds N]

Takes the Python, torch and nvcc that it finds and makes no environment of its own. Every job is a
process of its own, so that an illegal access in one kernel ends that job and no other; none starts
once the time is up. Where there is no CUDA device it says so, runs nothing and exits with 0; where
there is a GPU that torch can't use, or no torch to ask, it exits with 1.

`all` is test, bench and sanitize in turn on one budget of time. `prebuild` compiles on a machine
without a GPU, for the architectures that ADSC_CUDA_ARCHS names (90a); where the library comes from
there and from the very sources that lie here, nothing is compiled on the machine with the GPU.

Writes gpu-test.json (gpu-sanitize.json, gpu-bench.json) and a log beside it to the folder that
ADSC_OUT names (out/), anew with every result, and prints a short table last. ADSC_COMMIT names the
commit where there is no .git. ADSC_GPU_DRY_RUN=1 runs the very same files on CPU tensors, tiny,
with nothing built: a check of the files, whose JSON says so and is no result of a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from gpu_run import ROOT, Job, run_all
from gpu_show import left_out, print_benches, print_sanitizers, print_tests

sys.path.insert(0, str(ROOT))  # nothing is built or installed yet

SECONDS = 560  # for everything: a call on a lent machine is cut off a little later
# Of `all`: the seconds after which each target gives way to the next. What one leaves, it gets.
ENDS = {"test": 190, "bench": 440, "sanitize": SECONDS}
BACKENDS = ("cuda", "triton")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
LAST_CASE = 4  # seconds before the end after which no case of a bench begins
# Files whose tests take long: a process for each test. Behind the traps they come first.
SPLIT = ("parity", "compact", "compress_step", "compiled", "llava")
TRITON = importlib.util.find_spec("triton") is not None
DRY_RUN = os.environ.get("ADSC_GPU_DRY_RUN") == "1"
# Of a process that shares the processors; in a dry run two would wait for each other.
FEW_THREADS = {"OMP_NUM_THREADS": "1" if DRY_RUN else "2"}
SLACK = 10 if DRY_RUN else 1  # times as long: a dry run may have half a processor, and no lease
PREBUILT = ROOT / "adsc_kernels" / "libadsc_ops.sources"  # what the library was made from


# ---- The jobs of each target ----


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def pytest_job(folder: Path, name: str, what: list[str], backend: str, **environment: str) -> Job:
    xml = folder / f"{name} {backend}.xml".replace("/", " ")
    return Job(
        f"{name}, {backend}",
        python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junit-xml", xml, *what),
        lambda status, _: read_junit(status, xml),
        {"ADSC_GPU_TEST_BACKEND": backend, **FEW_THREADS, **environment},
    )


def test_jobs(folder: Path, only: str, deadline: float) -> list[Job]:
    """One for each test file, or test, and backend. A dry run takes all files in one, and, where
    Triton is, the calls that it must refuse under its interpreter."""
    files = (ROOT / "python_tests" / "gpu").glob("test_*.py")
    names = {file.stem.removeprefix("test_"): file for file in files}
    if DRY_RUN:
        wanted = [str(file) for name, file in names.items() if only in name]
        jobs = [pytest_job(folder, "all files", wanted, "cpu")]
        if "bad_input" in names and TRITON:
            what = [str(names["bad_input"])]
            jobs.append(pytest_job(folder, "bad_input", what, "triton", TRITON_INTERPRET="1"))
        return jobs
    parts: dict[str, list[str]] = {}
    order = ["traps", *SPLIT]
    order += sorted(names.keys() - set(order))
    for name, file in ((name, names[name]) for name in order if name in names):
        if name in SPLIT:
            for test in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE):
                parts[f"{name}::{test.removeprefix('test_')}"] = [f"{file}::{test}"]
        else:
            parts[name] = [str(file)]
    jobs = [pytest_job(folder, *part, backend) for backend in BACKENDS for part in parts.items()]
    return [job for job in jobs if only in job.name]


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
        # A process may be one test alone, which is skipped; without any pytest's status is not 0.
        "ok": status == 0 and not failures and passed + sum(skipped.values()) > 0,
        "passed": passed,
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
    }


def sanitize_jobs(folder: Path, only: str, deadline: float) -> list[Job]:
    """The same small selection under each tool, every tensor in an allocation of its own."""
    script = python("python_tests/gpu/sanitized.py")
    jobs = []
    for backend in ("cpu",) if DRY_RUN else BACKENDS:
        for tool in SANITIZERS:
            prefix = [sanitizer(), "--tool", tool, "--error-exitcode", "9"]
            prefix += ["--target-processes", "all"]  # python3 may be a launcher of the real one
            jobs.append(
                Job(
                    f"{tool}, {backend}",
                    ([] if DRY_RUN else prefix) + [*script, backend],
                    read_sanitizer,
                    {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **FEW_THREADS},
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


def bench_jobs(folder: Path, only: str, deadline: float) -> list[Job]:
    """The telling cases of every op, and then the rest."""
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no processes beside what is timed
    if DRY_RUN and TRITON:
        environment["TRITON_INTERPRET"] = "1"
    jobs = []
    for part in ("telling", "rest"):
        file = folder / f"{part}.json"
        jobs.append(
            Job(
                part,
                python("bench/gpu_bench.py", file, part, deadline - LAST_CASE),
                lambda status, _, file=file: {"ok": status == 0, **json.loads(file.read_text())},
                environment,
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


def sources() -> str:
    """A hash of all that the native library is made from, and of nothing that lies beside it."""
    files = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir(), *(ROOT / "csrc").rglob("*")]
    kinds = {".txt", ".cmake", ".in", ".h", ".cpp", ".cuh", ".cu"}
    found = hashlib.sha256()
    tests = ROOT / "csrc" / "tests"
    for file in sorted(f for f in files if f.suffix in kinds and tests not in f.parents):
        found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def compile_for(archs: str) -> None:
    print(f"building for {archs} ...", flush=True)
    subprocess.run(
        python("setup.py", "--quiet", "build_ext", "--inplace"),
        cwd=ROOT,
        env={**os.environ, "ADSC_CUDA": "1", "ADSC_CUDA_ARCHS": archs},
        check=True,
    )


def prebuild() -> None:
    """The native parts in place, for a GPU elsewhere and the Python that runs this."""
    compile_for(os.environ.get("ADSC_CUDA_ARCHS") or "90a")
    PREBUILT.write_text(sources() + "\n")
    files = [*(ROOT / "adsc_kernels").glob(f"_C.{sys.implementation.cache_tag}*.so")]
    for file in (*files, PREBUILT.with_suffix(".so"), PREBUILT):
        print(file.relative_to(ROOT))


def prebuilt() -> bool:
    """Whether a library from these very sources serves the GPU that is here. Asked of another
    process: a library that is loaded here could not be built anew."""
    if not PREBUILT.is_file() or PREBUILT.read_text().strip() != sources():
        return False
    code = "import sys, adsc_kernels; sys.exit(not adsc_kernels.available_backends()['cuda'][0])"
    return subprocess.run(python("-c", code), cwd=ROOT, capture_output=True).returncode == 0


def build() -> None:
    """The native parts in place, for this device alone, where they don't lie there already."""
    import torch

    if prebuilt():
        print("the library was built before", flush=True)
        return
    major, minor = torch.cuda.get_device_capability()
    compile_for(f"{major}{minor}" + ("a" if major == 9 else ""))


# ---- Running ----


def sees_gpus() -> bool:
    """Whether the driver lists any; the package may not be built, and is not asked."""
    if shutil.which("nvidia-smi") is None:
        return False
    done = subprocess.run(("nvidia-smi", "-L"), capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout.strip())


TARGETS = {
    "test": (test_jobs, print_tests),
    "bench": (bench_jobs, print_benches),
    "sanitize": (sanitize_jobs, print_sanitizers),
}


def run_target(target: str, only: str, deadline: float, facts: dict[str, Any]) -> bool:
    """Runs its jobs and writes its report with every result that comes; whether all is well."""
    begin = time.monotonic()
    name, (make_jobs, show) = f"gpu-{target}", TARGETS[target]
    out = Path(os.environ.get("ADSC_OUT") or ROOT / "out")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{'dry-run-' if DRY_RUN else ''}{name}.json"
    # Tests share the device, which is idle most of the time; what is timed has it for itself.
    shared = target != "bench" and not DRY_RUN
    together = min(len(os.sched_getaffinity(0)), 16) if shared else 1
    results: list[dict[str, Any]] = []
    ok, seconds = False, 0.0
    with tempfile.TemporaryDirectory() as folder, file.with_suffix(".log").open("w") as log:
        jobs = make_jobs(Path(folder), only, deadline)
        waiting = [job.name for job in jobs]
        for job in run_all(jobs, deadline, together):
            log.write(f"==== {job.name}\n{job.output}\n")
            log.flush()
            waiting.remove(job.name)
            results = [job.result for job in jobs if job.name not in waiting]
            ok = not waiting and all(result["ok"] for result in results)
            seconds = round(time.monotonic() - begin, 1)
            report = {"target": name, "ok": ok, "seconds": seconds, "stamp": facts}
            report |= {"jobs": results, "left_out": [*waiting, *left_out(results)]}
            file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{name} on {facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    show(results)
    print(f"left out: {', '.join(left_out(results)) or 'nothing'}")
    print(f"{'ok' if ok else 'NOT OK'}: {seconds} s; {file}", flush=True)
    return ok


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs a GPU target; see the head of this file.")
    parser.add_argument("target", choices=[*TARGETS, "all", "prebuild"])
    parser.add_argument("--only", default="", help="only the jobs whose name has this in it")
    seconds = SLACK * SECONDS
    parser.add_argument("--seconds", type=float, default=seconds, help="for everything together")
    options = parser.parse_args()
    if options.target == "prebuild":
        prebuild()
        return 0
    name = f"gpu-{options.target}"
    try:
        why = "" if DRY_RUN else missing_device()
    except ImportError as error:
        print(f"{name}: {sys.executable} can't import torch ({error}); nothing was run")
        return 1
    if why:
        print(f"{name}: {why}; nothing was run and no test counts as passed")
        return int(sees_gpus())  # 1: there is one, and this torch can't use it
    begin = time.monotonic()
    if not DRY_RUN:
        build()
    from adsc_kernels.stamp import stamp  # not before: the library may have to be built

    facts = stamp("cpu" if DRY_RUN else "cuda", dry_run=DRY_RUN)
    if options.target != "all":
        return not run_target(options.target, options.only, begin + options.seconds, facts)
    share = options.seconds / SECONDS  # of time, against what ENDS says
    done = [
        run_target(target, options.only, begin + share * end, facts) for target, end in ENDS.items()
    ]
    return not all(done)


if __name__ == "__main__":
    sys.exit(main())
