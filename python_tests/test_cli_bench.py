"""`adsc bench`: what it measures, and what it says about bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adsc_kernels.accounting import ModelShape
from adsc_kernels.cli import main
from adsc_kernels.cli.bench_e2e import largest
from adsc_kernels.cli.bench_e2e.cases import SHAPES, WAYS, Case
from adsc_kernels.cli.bench_e2e.device_time import kind_of
from adsc_kernels.cli.bench_e2e.models import Models
from adsc_kernels.errors import UnsupportedError


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


def test_prompts_and_answers_by_every_way(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "e2e.json"
    options = ["--shape", "tiny", "--batch", "2", "--vision", "36", "--new-tokens", "3"]
    options += ["--runs", "1", "--device", "cpu", "--out", str(file)]
    assert main(["bench", "e2e", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == found
    assert (found["model"], found["dtype"], found["runs"]) == ("tiny", "torch.float32", 1)
    assert found["stamp"]["device"] == "cpu" and found["left_out"] == []
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == list(WAYS)
    # On average (36 + 9 + 3 + 1) / 4 vision tokens; a cache row of K and V is 2 * 2 heads of 16.
    few, each = 4 * (113 + 2), 2 * 2 * 16 * 4 * 2
    staged = 4 * (101 + 2) + 36 + 9 + 3 + 1
    held = dict.fromkeys(("192", "128", "64"), staged) | {"before": few, "smaller": few}
    held |= dict.fromkeys(("dense", "transformers"), 4 * (137 + 2))  # the last token is not run
    assert {way: row["cache_bytes"] for way, row in rows.items()} == {
        way: held[way] * each if way in held else None for way in WAYS
    }
    averages = {way: row["average_tokens"] for way, row in rows.items()}
    assert averages == dict.fromkeys(WAYS, 12) | {
        **dict.fromkeys(("dense", "transformers"), 36),
        **dict.fromkeys(("192", "128", "64"), 12.25),
    }
    dense, fewer = rows["dense"]["prefill_macs"], rows["192"]["prefill_macs"]
    assert dense == rows["transformers"]["prefill_macs"] > fewer > rows["before"]["prefill_macs"]
    for way, row in rows.items():
        assert row["ttft_ms"] >= row["ttft_least_ms"] > 0
        assert (row["ms_per_token"] is None) == (way in ("fastv", "pyramid_drop"))
        assert row["prefill"] == row["step"] == {}  # nobody counts on a CPU


def test_one_token_takes_no_step(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "1", "--vision", "9", "--new-tokens", "1", "--runs", "1"]
    options += ["--ways", "192", "transformers", "--device", "cpu"]
    assert main(["bench", "e2e", *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("cpu, torch ") and "batch 1, 9 + 101 tokens, 1 new:" in text
    ours, theirs = text.splitlines()[-2:]
    assert ours.split()[:2] == ["192", "3.5"] and ours.split()[3] == theirs.split()[3] == "-"


def test_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the accounting, and as many bytes are allocated."""
    monkeypatch.setattr(largest, "WORKSPACE", 0)
    models = Models.random(SHAPES["tiny"], torch.device("cpu"), torch.float32)
    weights = sum(p.nbytes for p in models.ours.language_model.parameters())
    weights += models.ours.head.weight.nbytes
    each = {"dense": 4 * (137 + 2), "192": 4 * (101 + 2) + 36 + 9 + 3 + 1}
    for way, rows in each.items():
        size = rows * 2 * 2 * 16 * 4
        case = Case(36, 3, memory=weights + 3 * size + size // 2)
        row = largest.measure_largest(models, case, way, 1)
        assert (row["batch"], row["cache_bytes"]) == (3, 3 * size)
        assert row["decode_tokens_per_second"] == pytest.approx(3e3 / row["ms_per_token"], 0.01)
        with pytest.raises(UnsupportedError, match="room for the weights and one prompt"):
            largest.measure_largest(models, Case(36, 3, memory=weights + size - 1), way, 1)


def test_biases_of_qwen() -> None:
    """On queries, keys and values, and not behind them."""
    shape = ModelShape(2, 32, 2, 1, 16, 48, 64, qkv_bias=True)
    models = Models.random(shape, torch.device("cpu"), torch.float32)
    biases = [name for name, _ in models.ours.language_model.named_parameters() if "bias" in name]
    assert biases == [f"layers.{n}.self_attn.qkv_proj.bias" for n in range(2)]
    theirs = [name for name, _ in models.theirs.named_parameters() if "bias" in name]
    assert {name.rpartition("self_attn.")[2][0] for name in theirs} == set("qkv")
    ours = sum(p.numel() for p in models.ours.language_model.parameters())
    ours += models.ours.head.weight.numel()
    assert ours == sum(p.numel() for p in models.theirs.parameters())


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<cutlass::bf>", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "gemm"),
        ("downsample_add_rms_norm_kernel<bf16>", "norm"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16>", "norm"),
        ("adsc::downsample_kernel<uint4>", "boundary"),
        ("rotate_kernel", "pointwise"),
        ("Memcpy HtoD (Pageable -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "other"),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch: expected a whole number from 1"),
        (["--hidden", "-1"], "--hidden: expected a whole number from 1"),
        (["--keep", "3/2"], "keep"),
        (["e2e", "--shape", "7b"], "--shape: invalid choice: '7b'"),
        (["e2e", "--vision", "0"], "--vision: expected a whole number from 1"),
        (["e2e", "--ways", "slow"], "--ways: invalid choice: 'slow'"),
        (["e2e", "--memory", "0"], "--memory: expected a whole number from 1"),
        (["e2e", "--new-tokens", "1", "--memory", "8"], "--new-tokens: expected at least 2"),
        (["e2e", "--out", "/no/such/folder/file"], "--out: expected a file in a folder that"),
        (["e2e", "--model", "/no/such/folder"], "/no/such/folder"),
        (["--batch", "1", "2"], "--batch: expected one number for ops, got 2"),
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
