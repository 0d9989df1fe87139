"""What is said twice is compared, and what lies outside of its range is an error: nothing moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adsc_kernels import ops
from adsc_kernels.kv import tables
from adsc_kernels.kv.engines import crop_transformers

POOL = 6  # blocks of two rows
TABLE = torch.tensor([[4, 1, -1], [0, 5, 2]], dtype=torch.int32)
LENS = (3, 6)
KEEP = torch.tensor([0, 2, 1, 3, 5])
CU_KEPT = (0, 2, 5)


def paged(**changes: object) -> ops.CompactionResult:
    pool = torch.arange(POOL * 2 * 2, dtype=torch.float32).view(POOL, 2, 1, 2)
    before = pool.clone()
    arguments = {"block_table": TABLE, "keep_indices": KEEP, "cu_kept": CU_KEPT, "seq_lens": LENS}
    try:
        return ops.compact_paged_kv_(pool, None, **{**arguments, **changes})
    except Exception:
        assert torch.equal(pool, before)
        raise


@settings(max_examples=200, deadline=None)
@given(b=st.integers(0, 1), page=st.integers(0, 2), block=st.integers(0, POOL - 1))
def test_a_stale_host_table(b: int, page: int, block: int) -> None:
    host = TABLE.clone()
    host[b, page] = block
    if page * 2 >= LENS[b] or block == TABLE[b, page]:  # nobody reads it, or nothing changed
        paged(block_table_host=host.numpy())
        return
    with pytest.raises(ValueError, match=rf"^block_table_host: .*page {page} of sequence {b}, got"):
        paged(block_table_host=host)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["cu_kept", "seq_lens", "prefix_lens", "cu_rows"]),
    at=st.integers(0, 2),
    by=st.integers(-2, 2),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_ints_that_disagree(name: str, at: int, by: int, dtype: torch.dtype) -> None:
    hosts = {"cu_kept": CU_KEPT, "seq_lens": LENS, "prefix_lens": (0, 0), "cu_rows": (0, 3, 9)}
    host = hosts[name]
    device = torch.tensor(host, dtype=dtype)
    device[at % len(host)] += by
    if by == 0:
        paged(**{name: ops.Ints(host, device)})
        return
    with pytest.raises(ValueError, match=f"^{name}: expected Ints whose host and device"):
        paged(**{name: ops.Ints(host, device)})


@settings(max_examples=200, deadline=None)
@given(
    blocks=st.lists(st.integers(-3, POOL + 2) | st.sampled_from([-(2**62), 2**40]), max_size=3),
    form=st.sampled_from([list, torch.tensor]),
)
def test_read_only_blocks_outside_the_pool(
    blocks: list[int], form: Callable[[list[int]], object]
) -> None:
    blocks = [b for b in blocks if b not in TABLE]  # those that rows move into are another fault
    bad = [b for b in blocks if not -1 <= b < POOL]
    if not bad:
        paged(read_only_blocks=form(blocks))
        return
    with pytest.raises(ValueError, match=rf"^read_only_blocks: .* \[0, {POOL}\), .*got {bad[0]}$"):
        paged(read_only_blocks=form(blocks))


@settings(max_examples=200, deadline=None)
@given(
    page=st.integers(-1, 3) | st.sampled_from([2**30, 2**31 - 1, 2**40]),
    at=st.integers(0, 3),
    page_size=st.sampled_from([1, 2, 3]),
    wide=st.booleans(),
)
def test_pages_that_req_to_token_can_not_hold(
    page: int, at: int, page_size: int, wide: bool
) -> None:
    table = torch.full((1, 4), -1, dtype=torch.int64 if wide or page >= 2**31 else torch.int32)
    table[0, at] = page
    context = 5
    target = torch.full((2, context), 7, dtype=torch.int32)

    def write() -> None:
        tables.block_table_to_req_to_token_(target, [1], table, page_size=page_size)

    fits = (page + 1) * page_size <= 2**31 and (page < 0 or at * page_size < context)
    if not fits:
        with pytest.raises(ValueError, match=r"^block_table: expected"):
            write()
        assert (target == 7).all()
        return
    write()
    wanted = [page * page_size + i for i in range(page_size)] if page >= 0 else [0] * page_size
    begin = at * page_size
    assert target[1, begin : begin + page_size].tolist() == wanted[: max(context - begin, 0)]


@settings(max_examples=200, deadline=None)
@given(offsets=st.lists(st.integers(-1, 50), min_size=1, max_size=5))
def test_tensorrt_llm_offsets(offsets: list[int]) -> None:
    given_ = torch.tensor([offsets], dtype=torch.int32)
    odd = [n for n in offsets if n % 2 and n != -1]
    if odd:
        with pytest.raises(ValueError, match=f"^offsets: .*got {odd[0]}$"):
            tables.trtllm_offsets_to_block_table(given_)
    else:
        wanted = [-1 if n == -1 else n // 2 for n in offsets]
        assert tables.trtllm_offsets_to_block_table(given_).tolist() == [wanted]


@pytest.mark.parametrize(
    ("lens", "error"),
    [([-1], ValueError), ([1, 2], ValueError), ([], ValueError), ([1.0], TypeError),
     ([True], TypeError), ([5], ValueError)],
)  # fmt: skip
def test_crop_transformers(lens: list[int], error: type[Exception]) -> None:
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache()
    rows = torch.zeros(1, 1, 4, 2)
    cache.update(rows, rows, 0)
    with pytest.raises(error, match=r"^seq_lens: "):
        crop_transformers(cache, lens)
    assert cache.layers[0].keys.shape[2] == 4


# ---- eps ----


def normed(x: Tensor, eps: float) -> Tensor:
    return ops.downsample_add_rms_norm(
        x, x, torch.ones(2, dtype=x.dtype), eps=eps, keep_indices=torch.arange(len(x))
    )[0]


@settings(max_examples=200, deadline=None)
@given(
    eps=st.floats(0, 1e-30) | st.sampled_from([0.0, 1e-50, 1e-40, 1.2e-38, 1e-6, 1e38, 1e39]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_eps_is_what_the_norm_can_hold(eps: float, dtype: torch.dtype) -> None:
    limits = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.ones(1, 2, dtype=dtype)
    if eps == 0 or limits.tiny <= eps <= limits.max:
        assert normed(x, eps).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"^eps: expected 0, or "):
        normed(x, eps)


@settings(max_examples=200, deadline=None)
@given(
    spare=st.integers(0, 3),
    eps=st.sampled_from([0.0, 1e-6]),
    seed=st.integers(0, 99),
)
def test_gradients_of_spare_rows(spare: int, eps: float, seed: int) -> None:
    """Whatever comes back to a spare row, the others have the gradients they have without it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    layout = ops.BatchLayout(
        torch.tensor([0, 4], dtype=torch.int32), torch.tensor([[0, 0, 2]], dtype=torch.int32),
        "1/2", num_tokens=3 + spare,
    )  # fmt: skip
    out = ops.boundary_step(x, layout=layout, residual=torch.zeros_like(x), weight=weight, eps=eps)
    wild = torch.ones_like(out.hidden)
    wild[3:] = torch.inf
    (out.hidden**3 * 2 + out.hidden).backward(wild)
    got = x.grad, weight.grad
    x.grad = weight.grad = None
    rows = x[[0, 2, 3]]
    twin = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight
    (twin**3 * 2 + twin).sum().backward()
    torch.testing.assert_close(got, (x.grad, weight.grad))
