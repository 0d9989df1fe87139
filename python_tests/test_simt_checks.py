"""ADSC_CHECK=1, which is read once per process: so in one of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simt import ROOT, needs_simt

pytestmark = needs_simt


@pytest.mark.parametrize("name", ["simt_checks.py", "simt_checks_compress.py"])
def test_wrong_entries_trap_before_anything_outside_is_touched(name: str) -> None:
    script = Path(__file__).with_name(name)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"ADSC_CHECK": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
