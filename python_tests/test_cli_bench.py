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


def test_prompts_and_answers_by_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--batch", "2", "--vision", "36", "--new-tokens", "3"]
    options += ["--runs", "1", "--device", "cpu"]
    assert main(["bench", "e2e", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"] == "tiny, batch 2, 36 + 101 tokens, 3 new, torch.float32"
    ways = {row["way"]: row for row in found["rows"]}
    assert found["schedules"] == {"1:1/4,2:1/4,3:1/4": "1:1/4,2:1/4,3:1/4"}
    # On average (36 + 9 + 3 + 1) / 4 vision tokens; a cache row of K and V is 2 * 2 heads of 16.
    row = 2 * 2 * 16 * 4
    rows = {
        "dense": 4 * (137 + 2),
        "1:1/4,2:1/4,3:1/4": 4 * (101 + 2) + 36 + 9 + 3 + 1,
        "12 kept before the decoder": 4 * (113 + 2),
        "picture of 12": 4 * (113 + 2),
        "transformers, sdpa": 4 * (137 + 2),  # the last token of an answer is not run
    }
    assert {way: facts["cache_bytes"] for way, facts in ways.items()} == {
        way: 2 * n * row for way, n in rows.items()
    }
    assert all(min(r["ttft_ms"], r["ms_per_token"]) > 0 for r in ways.values())
    assert main(["bench", "e2e", *options]) == 0
    text = capsys.readouterr().out
    assert "first token, ms" in text and "transformers, sdpa" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch: expected a whole number from 1"),
        (["--hidden", "-1"], "--hidden: expected a whole number from 1"),
        (["--keep", "3/2"], "keep"),
        (["e2e", "--shape", "7b"], "--shape: invalid choice: '7b'"),
        (["e2e", "--vision", "0"], "--vision: expected a whole number from 1"),
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
