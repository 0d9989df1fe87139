"""The Triton kernels compiled for sm_80 and sm_90, with no GPU: no spills, 128-bit accesses.

What is compiled is what the launchers pick: see triton_ahead.py.
"""

import pytest
import torch
from cases.segment_tables import image_stage

pytest.importorskip("triton")

from triton_ahead import Kernel, ahead_of_time

from adsc_kernels.pointwise import Place, Rope
from adsc_kernels.triton import (
    boundary_step,
    decode_attention,
    downsample,
    downsample_add_rms_norm,
    launch,
    pointwise,
    rebuild_metadata,
    upsample_grad,
)

ARCHITECTURES = [80, 90]
STAGE = image_stage(2)
T = STAGE.num_tokens_in
TABLE = (STAGE.segments, None, STAGE.num_tokens)
HIDDEN = torch.zeros(T, 4096, dtype=torch.bfloat16)
POSITIONS = torch.arange(T)
BYTES = torch.zeros(T, 3, dtype=torch.int8)
ROWS = torch.arange(10)


def check(kernel: Kernel, widest: int) -> None:
    """widest: bits of the widest load and store that the payload allows; 0: no matter."""
    assert "__assertfail" not in kernel.ptx
    assert kernel.stack == 0, kernel
    assert kernel.spills == 0, kernel
    assert widest == 0 or max(kernel.widths("st")) == widest, kernel
    assert widest == 0 or widest in kernel.widths("ld"), kernel
    if widest == 128:
        assert "LDG.E.128" in kernel.sass
        assert "STG.E.128" in kernel.sass


def each(arch: int, launches: dict) -> None:
    for name, (run, widest) in launches.items():
        with ahead_of_time(arch) as kernels:
            run()
        assert kernels, name
        for kernel in kernels[:-1]:
            check(kernel, 0)
        check(kernels[-1], widest)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_downsample(arch: int) -> None:
    each(
        arch,
        {
            "hidden": (lambda: downsample.downsample(HIDDEN, *TABLE), 128),
            "indices": (
                lambda: downsample.downsample(HIDDEN[:, :4088].clone(), None, ROWS, 10),
                128,
            ),
            "2 bytes": (lambda: downsample.downsample(HIDDEN[:, 1:], *TABLE), 16),
            "many": (lambda: downsample.downsample_many([HIDDEN, POSITIONS, BYTES], *TABLE), 128),
        },
    )


def test_misaligned_rows_are_not_read_in_wide_words() -> None:
    """A CPU, and so the interpreter, would not mind; a GPU stops."""
    x = HIDDEN.flatten()[1 : 1 - 4096].view(T - 1, 4096)
    with ahead_of_time(90) as kernels:
        downsample.downsample(x, None, ROWS, 10)
    assert kernels[0].widths("ld") == {16, 64}  # rows, indices


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norm(arch: int) -> None:
    def run(width: int, dtype: torch.dtype) -> None:
        x = torch.zeros(T, width, dtype=dtype)
        downsample_add_rms_norm.downsample_add_rms_norm(
            x, x, torch.zeros(width, dtype=dtype), *TABLE, 1e-6
        )

    each(
        arch,
        {
            "bfloat16": (lambda: run(4096, torch.bfloat16), 128),
            "float32, not a power of two": (lambda: run(5120, torch.float32), 128),
            "more than a block": (lambda: run(20480, torch.bfloat16), 128),
        },
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rebuild_metadata(arch: int) -> None:
    def run(batch: int, grid: bool) -> None:
        cu_seqlens, spans = torch.zeros(batch + 1).int(), torch.zeros(batch, 5).int()
        keep = [1, 2, 1, 2] if grid else [1, 4]
        rebuild_metadata.rebuild_metadata(cu_seqlens, spans, keep, "grid" if grid else "start", 24)

    each(arch, {"small": (lambda: run(128, False), 0), "large grids": (lambda: run(129, True), 0)})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_upsample_grad(arch: int) -> None:
    def run(grad: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        upsample_grad.upsample_grad(grad, None if rows is not None else STAGE.segments, rows, T)

    tokens = STAGE.num_tokens
    each(
        arch,
        {
            "bfloat16": (lambda: run(torch.zeros(tokens, 4096, dtype=torch.bfloat16)), 128),
            "narrow, indices": (lambda: run(torch.zeros(10, 3), ROWS), 32),
        },
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_boundary_step(arch: int) -> None:
    weight, others = torch.zeros(4096, dtype=torch.bfloat16), [POSITIONS]
    cu_seqlens, spans = torch.zeros(9).int(), torch.zeros(8, 5).int()
    layout = (None, None, cu_seqlens, spans, [1, 2, 1, 2], "grid", 24, STAGE.num_tokens)
    table = (*TABLE[:2], None, None, [], "start", 0, STAGE.num_tokens)
    pre_norm = (HIDDEN, HIDDEN, weight, 1e-6)
    plain = (HIDDEN, None, None, 0.0)
    each(
        arch,
        {
            "norm, layout": (lambda: boundary_step.boundary_step(*pre_norm, others, *layout), 128),
            "norm, table": (lambda: boundary_step.boundary_step(*pre_norm, [], *table), 128),
            "layout": (lambda: boundary_step.boundary_step(*plain, others, *layout), 128),
            "table": (lambda: boundary_step.boundary_step(*plain, others, *table), 128),
        },
    )


def test_checking(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ADSC_CHECK=1 there is code that stops the program and names the argument."""
    cu_seqlens, spans = torch.zeros(9).int(), torch.zeros(8, 3).int()
    monkeypatch.setattr(launch, "CHECK", True)
    with ahead_of_time(90) as kernels:
        downsample.downsample(HIDDEN, *TABLE)
        downsample.downsample(HIDDEN, None, ROWS, 10)
        rebuild_metadata.rebuild_metadata(cu_seqlens, spans, [1, 4], "start", 0)
    names = ("segments:", "keep_indices:", "spans:")
    for name, kernel in zip(names, kernels, strict=True):
        assert "__assertfail" in kernel.ptx
        message = ",".join(map(str, name.encode()))  # PTX has it as bytes
        assert message in kernel.ptx.replace(" ", "")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pointwise(arch: int) -> None:
    table = torch.zeros(10, 1, 128, dtype=torch.bfloat16)
    cache = torch.zeros(2, 20, 8, 128, dtype=torch.bfloat16)

    def rotate(place: Place | None) -> None:
        qkv = torch.zeros(10, 48, 128, dtype=torch.bfloat16)
        pointwise.rotate_(qkv, Rope(table, table), 8, place)

    gate_up = torch.zeros(10, 2 * 11008, dtype=torch.bfloat16)
    each(
        arch,
        {
            "rotate": (lambda: rotate(None), 128),
            "rotate and write": (lambda: rotate(Place(*cache, ROWS)), 128),
            "by address": (lambda: rotate(Place(*torch.zeros(2).long().split(1), ROWS)), 128),
            "silu_mul": (lambda: pointwise.silu_mul(gate_up), 128),
        },
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (28, 4)])
@pytest.mark.parametrize("given", [(), ("address",), ("address", "blocks")])
def test_decode_attention(
    arch: int, dtype: torch.dtype, heads: int, kv_heads: int, given: tuple[str, ...]
) -> None:
    q = torch.zeros(2, heads + 2 * kv_heads, 128, dtype=dtype)[:, :heads]
    k = torch.zeros(64, kv_heads, 128, dtype=dtype)
    bounds = torch.zeros(5, dtype=torch.int32)
    table = torch.zeros(2, 188, dtype=torch.int32)
    known = {"address": torch.zeros(2, dtype=torch.int64), "blocks": (table, 16)}
    options = {"shares": 8, **{name: known[name] for name in given}}
    with ahead_of_time(arch) as kernels:
        decode_attention.decode_attention(q, k, k, bounds, 3000, 0.1, **options)
    shares, merge = kernels
    check(merge, 0)
    if dtype is torch.bfloat16:  # float32 has no matrix units, and may want for registers
        check(shares, 0)
    assert 128 in shares.widths("ld")
    assert 128 in shares.widths("st")
    assert "LDGSTS.E" in shares.sass  # keys and values go to shared memory while others are used
    assert shares.shared <= 99 * 1024  # as much as a block has on GPUs of 8.6 and 8.9
    assert ("HMMA" in shares.sass) == (dtype is torch.bfloat16)
