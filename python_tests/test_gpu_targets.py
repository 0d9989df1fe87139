"""The GPU targets: that they run nothing where there is no GPU, and, by a dry run on CPU tensors,
that everything in them but the kernels works."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TARGETS = ("test", "sanitize", "bench", "all")


def run(
    target: str, out: Path, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ADSC_")}
    return subprocess.run(
        [sys.executable, "tools/gpu.py", target, *options],
        cwd=ROOT,
        env={**inherited, "ADSC_OUT": str(out), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("target", TARGETS)
def test_without_a_device_nothing_is_run(target: str, tmp_path: Path) -> None:
    done = run(target, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert re.search(r"no CUDA device; nothing was run and no test counts as passed", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_without_torch_it_fails(target: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = run(target, tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "can't import torch (no torch here); nothing was run" in done.stdout


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    done = run("all", tmp_path, ADSC_GPU_DRY_RUN="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    names = {f"dry-run-gpu-{target}" for target in ("test", "sanitize", "bench")}
    assert {file.name for file in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("json", "log")
    }
    for name in names:
        report: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["ok"] and report["jobs"] and not report["left_out"]
        stamp = report["stamp"]
        assert stamp["dry_run"] and stamp["device"] == "cpu (dry run)" and stamp["driver"] is None
        assert {"commit", "torch", "python", "triton", "nvcc", "date"} <= stamp.keys()
    tests = json.loads((tmp_path / "dry-run-gpu-test.json").read_text())
    assert tests["jobs"][0]["passed"] > 150  # every form, not the first cases alone


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    done = run("sanitize", tmp_path, "--seconds=0", ADSC_GPU_DRY_RUN="1")
    assert done.returncode == 1
    assert "left out: memcheck, cpu\n" in done.stdout
    report = json.loads((tmp_path / "dry-run-gpu-sanitize.json").read_text())
    assert not report["ok"] and report["left_out"] == ["memcheck, cpu"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/gpu.py"""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("gpu")


def test_every_gpu_test_is_in_one_job_of_each_backend(gpu: ModuleType, tmp_path: Path) -> None:
    jobs = gpu.test_jobs(tmp_path, "", 0)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    backends = [name.rpartition(", ")[2] for name in names]
    half = len(names) // 2
    assert backends == ["cuda"] * half + ["triton"] * half
    found: dict[str, set[str]] = {}
    for job in jobs[:half]:
        file, _, test = job.command[-1].partition("::")
        found.setdefault(Path(file).name, set()).add(test)
    files = {file.name: file for file in (ROOT / "python_tests" / "gpu").glob("test_*.py")}
    assert found.keys() == files.keys()
    for name, tests in found.items():
        if tests != {""}:
            assert tests == set(re.findall(r"def (test_\w+)", files[name].read_text()))
    assert {"parity::downsample, cuda", "traps, triton"} <= set(names)
    of_triton = [job.name for job in gpu.test_jobs(tmp_path, "triton", 0)]
    assert of_triton == names[half:]
    llava = {job.name.partition("::")[0] for job in gpu.test_jobs(tmp_path, "llava", 0)}
    assert llava == {"llava"}


def test_a_process_whose_tests_are_skipped_has_not_failed(gpu: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    case = '<testcase classname="a" name="b"><{0} message="why"/></testcase>'
    for kind, ok in (("skipped", True), ("failure", False), ("error", False)):
        file.write_text(f"<testsuite>{case.format(kind)}</testsuite>")
        assert gpu.read_junit(0, file)["ok"] is ok
    assert gpu.read_junit(1, file)["ok"] is False
    file.write_text("<testsuite></testsuite>")
    assert gpu.read_junit(0, file)["ok"] is False


def test_a_library_from_other_sources_is_not_taken(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "libadsc_ops.sources"
    monkeypatch.setattr(gpu, "PREBUILT", mark)
    monkeypatch.setattr(gpu, "python", lambda *_: ["true"])  # a library that serves the GPU
    assert not gpu.prebuilt()
    mark.write_text(gpu.sources() + "\n")
    assert gpu.prebuilt()
    mark.write_text("0" * 64 + "\n")
    assert not gpu.prebuilt()


def test_the_targets_make_no_environment() -> None:
    """They don't depend on venv, and call the Python that is found."""
    makefile = (ROOT / "Makefile").read_text()
    for target in TARGETS:
        rule = re.search(rf"^gpu-{target}:(.*)\n\t(.*)\n", makefile, flags=re.MULTILINE)
        assert rule is not None
        assert "venv" not in rule[1].partition("##")[0]
        assert rule[2] == f"@$(PYTHON) tools/gpu.py {target}"


def test_gpu_tests_are_not_part_of_the_suite() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "python_tests"]
    options = ["-p", "no:cacheprovider", "--ignore-glob=python_tests/test_*"]
    options.append("--ignore=python_tests/hf")
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert "no tests collected" in done.stdout, done.stdout
