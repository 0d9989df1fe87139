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
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--hidden", "-1"], "--hidden: expected at least 1, got -1"),
        (["--keep", "3/2"], "keep"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
