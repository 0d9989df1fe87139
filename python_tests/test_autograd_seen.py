"""Autograd sees what the ops do: version counters, inference tensors, torch.func, tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases.compact import Case, dense_cases, paged_cases
from cases.segment_tables import FakeStage, by_stage, stages
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from adsc_kernels import UnsupportedError, ops, reference


def rows_of(stage: FakeStage) -> Tensor:
    return torch.tensor(reference.source_rows(*by_stage(stage)), dtype=torch.int64)


def normed(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    total = x + residual
    return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight


Op = Callable[..., Any]


def movements(stage: FakeStage, raw: bool) -> dict[str, tuple[Op, Op]]:
    """Each op as a function of [T, 4] in float64, and the same in torch's own ops."""
    rows = rows_of(stage)
    table = by_stage(stage)
    native = torch.ops.adsc_kernels
    weight = torch.linspace(0.5, 2, 4, dtype=torch.float64)

    def norm_twin(x: Tensor) -> Tensor:
        return normed(x[rows], 2 * x[rows], weight, 1e-3)

    if raw:
        no_layout = (None, None, [], "start", 0, stage.num_tokens)
        return {
            "downsample": (lambda x: native.downsample(x, *table), lambda x: x[rows]),
            "many": (
                lambda x: native.downsample_many([x, x * x], *table)[1],
                lambda x: x[rows] ** 2,
            ),
            "norm": (
                lambda x: native.downsample_add_rms_norm(x, 2 * x, weight, *table, 1e-3)[0],
                norm_twin,
            ),
            "boundary": (
                lambda x: native.boundary_step(
                    x, 2 * x, weight, 1e-3, [x], *table[:2], *no_layout
                )[0],
                norm_twin,
            ),
            "upsample": (
                lambda x: native.upsample_grad(x[rows].contiguous(), *table[:2], len(x)),
                lambda x: torch.zeros_like(x).index_add(0, rows, x[rows]),
            ),
        }  # fmt: skip
    return {
        "downsample": (lambda x: ops.downsample(x, stage), lambda x: x[rows]),
        "many": (lambda x: ops.downsample_many([x, x * x], stage)[1], lambda x: x[rows] ** 2),
        "norm": (
            lambda x: ops.downsample_add_rms_norm(x, 2 * x, weight, stage, 1e-3)[0],
            norm_twin,
        ),
        "boundary": (
            lambda x: (
                ops.boundary_step(
                    x, stage, residual=2 * x, weight=weight, eps=1e-3, others=[x]
                ).hidden
            ),
            norm_twin,
        ),
        "indices": (lambda x: ops.downsample(x, keep_indices=rows), lambda x: x[rows]),
    }


def dual(f: Op, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))
        return torch.zeros_like(out.primal) if out.tangent is None else out.tangent


TRANSFORMS: dict[str, Callable[[Op, Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "dual": dual,
    "grad": lambda f, x, v: torch.func.grad(lambda t: (f(t) ** 3).sum())(x),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](f(v))[0],
    "jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "second": lambda f, x, v: torch.func.jvp(
        torch.func.grad(lambda t: (f(t) ** 3).sum()), (x,), (v,)
    )[1],
}


@settings(max_examples=200, deadline=None)
@given(
    stage=stages(max_sequences=2, max_length=5),
    raw=st.booleans(),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    seed=st.integers(0, 9),
)
def test_transforms(stage: FakeStage, raw: bool, transform: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, stage.num_tokens_in, 4, dtype=torch.float64, generator=generator)
    for name, (op, twin) in movements(stage, raw).items():
        apply = TRANSFORMS[transform]
        torch.testing.assert_close(
            apply(op, x, v), apply(twin, x, v), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_tangent_of_a_layout_with_spare_rows() -> None:
    layout = ops.BatchLayout(
        torch.tensor([0, 6], dtype=torch.int32),
        torch.tensor([[0, 1, 4]], dtype=torch.int32),
        "1/2",
        num_tokens=6,
    )
    x, v = torch.randn(2, 6, 4, dtype=torch.float64)
    weight = torch.ones(4, dtype=torch.float64)

    def step(x: Tensor) -> Tensor:
        out = ops.boundary_step(x, layout=layout, residual=x, weight=weight, eps=0.0, others=[x])
        return out.others[0] + out.hidden

    rows = torch.tensor([0, 1, 3, 5])

    def twin(x: Tensor) -> Tensor:
        out = x[rows] + normed(x[rows], x[rows], weight, 0.0)
        return torch.cat([out, out.new_zeros(2, 4)])

    for transform in ("jvp", "jacrev", "vmap"):
        apply = TRANSFORMS[transform]
        torch.testing.assert_close(apply(step, x, v), apply(twin, x, v))


def test_indices_may_be_batched() -> None:
    x = torch.randn(5, 2)
    rows = torch.tensor([[0, 3], [4, 4]])
    moved = torch.func.vmap(lambda i: ops.downsample(x, keep_indices=i))(rows)
    assert torch.equal(moved, x[rows])


# ---- What is written in place ----


def versions(tensors: list[Tensor]) -> list[int]:
    return [x._version for x in tensors]


def caches_of(arguments: dict[str, Any]) -> list[Tensor]:
    names = ("k_caches", "v_caches", "k_scales", "v_scales")
    return [x for name in names for x in arguments.get(name) or []]


@settings(max_examples=200, deadline=None)
@given(case=st.one_of(dense_cases(), paged_cases()), joined=st.booleans())
def test_version_counters(case: Case, joined: bool) -> None:
    arguments = case.build().arguments
    tensors = caches_of(arguments)
    before = versions(tensors)
    paged = "block_table" in arguments
    if joined:
        cache = (ops.PagedCache if paged else ops.DenseCache)(**arguments)
        ops.compress_step(torch.zeros(2, 2), cache, keep_indices=torch.tensor([1]))
    else:
        (ops.compact_paged_kv_ if paged else ops.compact_kv_)(**arguments)
    assert all(new > old for new, old in zip(versions(tensors), before, strict=True))


def dense(k: Tensor) -> None:
    ops.compact_kv_(k, None, keep_indices=torch.tensor([2]), cu_kept=[0, 1], seq_lens=[3],
                    seq_starts=[0, 3])  # fmt: skip


def paged(k: Tensor) -> None:
    ops.compact_paged_kv_(k, None, torch.tensor([[0]]), block_size=3, cu_kept=[0, 1], seq_lens=[3],
                          keep_indices=torch.tensor([2]))  # fmt: skip


def step(k: Tensor) -> None:
    cache = ops.DenseCache(k, None, keep_indices=torch.tensor([2]), cu_kept=[0, 1], seq_lens=[3],
                           seq_starts=[0, 3])  # fmt: skip
    ops.compress_step(torch.zeros(2, 2), cache, keep_indices=torch.tensor([1]))


def raw(k: Tensor) -> None:
    torch.ops.adsc_kernels.compact_kv_(
        [k], 1, None, torch.tensor([[[2]]]), torch.tensor([0, 1]), None, None, torch.tensor([3]),
        torch.tensor([0, 3]), "NHD"
    )  # fmt: skip


WRITERS = [dense, paged, step, raw]


@pytest.mark.parametrize("write", WRITERS)
def test_a_backward_that_needs_what_was_written_raises(write: Callable[[Tensor], None]) -> None:
    a = torch.randn(3, 1, 2, requires_grad=True)
    k = a * 2
    y = (k * k).sum()
    write(k.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("write", WRITERS)
def test_inference_tensors(write: Callable[[Tensor], None]) -> None:
    with torch.inference_mode():
        k = torch.arange(6.0).view(3, 1, 2)
    before = k.clone()
    with pytest.raises(ValueError, match=r"caches\[0\]: .*inference tensor"):
        write(k)
    assert torch.equal(k, before)
    with torch.inference_mode():
        write(k)
        assert torch.equal(k[0], before[2])


@pytest.mark.parametrize("write", WRITERS)
def test_transforms_of_writes_are_refused(write: Callable[[Tensor], None]) -> None:
    with pytest.raises((UnsupportedError, RuntimeError), match=r"torch\.func|Batching rule"):
        torch.func.vmap(write)(torch.zeros(2, 3, 1, 2))
