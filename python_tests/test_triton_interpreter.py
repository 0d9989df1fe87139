"""The Triton kernels under Triton's interpreter, on the CPU.

Whether kernels are interpreted is settled when they are defined, so the tests, which lie in
interpreted/, run in a Python of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")
FILES = sorted(FOLDER.glob("check_*.py"))

pytest.importorskip("triton")


@pytest.mark.slow
def test_the_kernels_against_the_reference() -> None:
    assert FILES
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=FOLDER.parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
