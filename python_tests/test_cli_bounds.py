"""Drawn bad input to the command line: one line, status 2, at once, and without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adsc_kernels import __version__, llava
from adsc_kernels.cli import main

assert llava  # imported here, so that no command's time is that of transformers
HUGE = ["1" * 30, "9" * 5000, "-1", "1e9", "1.5", "\u0663", "one", "", " 1", "0x10", "1_0"]
SCHEDULES = ["8", "8:", "8:5/4", "9" * 5000 + ":1/2", "8:1/" + "9" * 50, "\u0663:1/4", "8:1/4@no"]
DEVICES = ["nope", "cuda:99", "meta", "", "cpu:x"]
SIZES = ["4x", "x4", "99999x99999", "65537x1", "4x4x4", "\u0664x4"]
SIZES += [text for text in HUGE if text != "0x10"]  # a grid of no rows
PLAN = ["plan", "--schedule", "8:1/4"]
BAD: dict[tuple[str, ...], list[str]] = {
    ("plan", "--schedule"): SCHEDULES,
    (*PLAN, "--layers"): [*HUGE, "2147483647", "0"],
    (*PLAN, "--prompt-tokens"): [*HUGE, "2147483648"],
    (*PLAN, "--image-tokens"): SIZES,
    (*PLAN, "--image-start"): HUGE,
    (*PLAN, "--span"): ["0:5", "0:5:x", "a:5:4", "0:5:99999x99999", "0:\u0665:4"],
    (*PLAN, "--chunk"): ["5", "a:b", "5:" + "9" * 5000],
    (*PLAN, "--block-size"): [*HUGE, "0"],
    ("visualize", "--grid"): [*SIZES, "40000x40000", "0x4", "129x128"],
    ("visualize", "--layers"): HUGE,
    ("visualize", "--schedule"): [*SCHEDULES, ",".join(f"{n}:9/10" for n in range(32))],
    ("account", "--budget"): [*HUGE[:3], "1e9999999", "1e-9999999", "1/0", "nan", "\u0661"],
    ("account", "--boundaries"): [*HUGE, "0", "32", "1000000000"],
    ("account", "--text-tokens"): HUGE,
    ("account", "--image-tokens"): [*SIZES, "2147483647"],
    ("account", "--tiles"): HUGE,
    ("account", "--decode"): HUGE,
    ("account", "--schedule"): [*SCHEDULES, "llava-1.5-13b/192"],
    ("account", "--kv-scale-bytes"): HUGE,
    ("bench", "--hidden"): [*HUGE, "1000000000000", "0"],
    ("bench", "--batch"): [*HUGE, "1048577", "0"],
    ("bench", "--device"): DEVICES,
    ("bench", "--keep"): ["5/4", "x", "1/4@grid", "9" * 5000],
    ("run", "--max-new-tokens"): [*HUGE, "0"],
    ("run", "--prefill-chunk"): [*HUGE, "0"],
    ("run", "--runs"): [*HUGE, "0", "10001"],
    ("run", "--seed"): ["1" * 30, "1.5", "\u0663", ""],
    ("run", "--temperature"): ["hot", "nan", "1e-50", "-1", "\u0660", ""],
    ("run", "--device"): DEVICES,
    ("run", "--schedule"): [*SCHEDULES, "llava-1.5-7b/192"],
    ("run", "--model"): ["", "./nowhere"],
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    begin = time.process_time()
    try:
        status = main(arguments)
    except SystemExit as leave:  # argparse's way
        status = leave.code
    seconds = time.process_time() - begin
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), (arguments, status, out[:200])
    assert err.count("\n") == 1 and len(err) < 6000
    assert re.match(rf"adsc( {arguments[0]})?: error: ", err)
    assert seconds < 2, arguments  # of which parsing takes nearly none
    return err


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(options=st.sampled_from(sorted(BAD)), data=st.data())
def test_drawn(options, data, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    value = data.draw(st.sampled_from(BAD[options]))
    err = refused([*options[:-1], f"{options[-1]}={value}"], capsys)
    assert "Traceback" not in err


def command(*arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    code = "import sys, adsc_command; sys.exit(adsc_command.main(sys.argv[1:]))"
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    line = [sys.executable, "-c", code, *arguments]
    how = {"capture_output": True} | how
    return subprocess.run(line, text=True, env=environment, timeout=600, **how)


LIGHT = """
import sys, adsc_command
try: adsc_command.main({arguments})
except SystemExit: pass
print(sorted({{"torch", "transformers", "PIL.ImageDraw"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["account", "--help"],
        ["account", "--schedule", "llava-1.5-7b/192"],
        ["plan", "--schedule", "8:1/4", "--layers", "2147483647"],
        ["visualize", "--grid", "40000x40000"],
        ["bench", "--hidden", "1000000000000"],
    ],
)
def test_without_torch(arguments) -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert "torch" not in done.stdout.splitlines()[-1], done.stdout


def test_version_and_module() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"adsc {__version__}\n")
    module = subprocess.run(
        [sys.executable, "-m", "adsc_kernels", "--version"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (module.returncode, module.stdout) == (0, f"adsc {__version__}\n")


def test_stdout_closed() -> None:
    closed = command("account", capture_output=False, stderr=subprocess.PIPE,
                     preexec_fn=lambda: os.close(1))  # fmt: skip
    assert closed.returncode == 1
    assert closed.stderr == "adsc account: error: stdout is closed\n"
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = command("account", capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode in (1, 2)  # as it is flushed, or in the midst of printing
        assert done.stderr.endswith("No space left on device\n") and done.stderr.count("\n") == 1


def test_a_preset_brings_its_own_layers(capsys) -> None:
    assert main(["plan", "--schedule", "llava-1.5-13b/192"]) == 0
    assert "22-39" in capsys.readouterr().out
    refused(["plan", "--schedule", "llava-1.5-13b/192", "--layers", "32"], capsys)


def test_a_checkpoint_of_ten_million_layers(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"num_hidden_layers": 10000000}}')
    for name in ("run", "account"):
        err = refused([name, "--model", str(tmp_path)], capsys)
        assert "num_hidden_layers: expected at most 10000, got 10000000" in err
    (tmp_path / "config.json").write_text("[" * 100_000)
    for name in ("run", "account"):
        assert "not valid JSON" in refused([name, "--model", str(tmp_path)], capsys)
