"""`adsc bench`: what it measures, and what it says about bad input."""

from __future__ import annotations

import json

import pytest

from adsc_kernels.cli import main


def test_every_op_beside_pytorch_and_a_copy(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "2", "--hidden", "32", "--keep", "1/3", "--device", "cpu"]
    assert main(["bench", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = 2 * (101 + 192)
    sizes = {
        "downsample": 2 * 64 * rows,
        "downsample_many": 2 * (2 * 64 + 8) * rows,
        "downsample_add_rms_norm": 4 * 64 * rows,
    }
    assert {op: facts["bytes_moved"] for op, facts in found["ops"].items()} == sizes
    for facts in found["ops"].values():
        assert {"cpu", "PyTorch", "plain copy"} <= set(facts["microseconds"])
        assert min(facts["microseconds"].values()) > 0
    assert main(["bench", *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("cpu, torch ") and f"{rows} of {2 * 677} rows stay" in text
    assert text.count("plain copy") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch: expected a whole number from 1"),
        (["--hidden", "-1"], "--hidden: expected a whole number from 1"),
        (["--keep", "3/2"], "keep"),
        (["--hidden", "1000000000000"], "--hidden: expected a whole number from 1 to 1048576"),
        (["--hidden", "1000000", "--batch", "1000"], "expected at most 1.00 GiB of rows"),
        (["--device", "nope"], "--device: expected a device such as 'cpu'"),
        (["--device", "meta"], "--device: expected one that holds values, got 'meta'"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["bench", "--device", "cpu", *options])
    except SystemExit as leave:  # argparse's way
        status = leave.code
    assert status == 2
    assert message in capsys.readouterr().err
