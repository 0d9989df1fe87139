"""The GPU targets: that they run nothing where there is no GPU, and, by a dry run on CPU tensors,
that everything in them but the kernels works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TARGETS = ("test", "sanitize", "bench")


def run(target: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ADSC_")}
    return subprocess.run(
        [sys.executable, "tools/gpu.py", target],
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
@pytest.mark.parametrize("target", TARGETS)
def test_dry_run(target: str, tmp_path: Path) -> None:
    done = run(target, tmp_path, ADSC_GPU_DRY_RUN="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {
        f"dry-run-gpu-{target}.json",
        f"dry-run-gpu-{target}.log",
    }
    report: dict[str, Any] = json.loads((tmp_path / f"dry-run-gpu-{target}.json").read_text())
    assert report["ok"] and report["jobs"]
    stamp = report["stamp"]
    assert stamp["dry_run"] and stamp["device"] == "cpu (dry run)" and stamp["driver"] is None
    assert {"commit", "torch", "python", "triton", "nvcc", "date"} <= stamp.keys()


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
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert "no tests collected" in done.stdout, done.stdout
