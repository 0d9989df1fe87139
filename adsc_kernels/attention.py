"""Variable-length causal attention, by the first of `attention_backends` that takes the call.

Queries are packed by a stage's `cu_seqlens`. Keys are the same packed rows (a prompt run whole), or
lie in a cache, where each sequence has a stretch of its own that it need not fill (`CachedKeys`).
The causal mask is aligned bottom-right: the last query row of a sequence sees all of its keys.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from adsc_kernels import checks
from adsc_kernels.attention_backends import BACKENDS, DECODE, PREFILL, choose
from adsc_kernels.attention_calls import lacks_triton
from adsc_kernels.attention_keys import CachedKeys as CachedKeys
from adsc_kernels.attention_keys import Keys, PagedKeys, Rows
from adsc_kernels.errors import UnsupportedError

STAGE_FIELDS = ("cu_seqlens", "seq_lens", "max_seqlen", "num_tokens")


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Rows,
    *,
    keys: Keys | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of each sequence's query rows over its own keys.

    Args:
        q: [T, Hq, D], rows packed by `stage.cu_seqlens`.
        k, v: [T, Hkv, D] packed like q, or with `keys` the cache [capacity, Hkv, D], of blocks with
            `PagedKeys`; Hkv divides Hq.
        stage: a StagePlan, or anything with cu_seqlens, seq_lens, max_seqlen and num_tokens.
        keys: where each sequence's keys lie in the cache; None means packed like the queries.
        scale: of the scores; None means 1/sqrt(D).
        backend: "auto", or the name of one of `attention_backends.BACKENDS`.

    Returns: [T, Hq, D].

    Raises: ValueError on shapes that don't fit, TypeError on mixed dtypes, UnsupportedError where
        the backend asked for can't do this call (it says why).
    """
    checks.choice("backend", backend, ("auto", *BACKENDS))
    if scale is not None:
        checks.number("scale", scale)
    if not torch.compiler.is_compiling():  # a compiled program would be of these lengths only
        _check(q, k, v, stage, keys)
    one_row_each = stage.max_seqlen == 1 and stage.num_tokens == len(stage.seq_lens)
    phase = PREFILL if keys is None or not one_row_each else DECODE
    kind = (phase, q.device, q.dtype, q.shape[2], getattr(keys, "block_size", None))
    if backend == "auto":
        backend, _ = choose(*kind)
    elif reason := BACKENDS[backend].why_not(*kind):
        raise UnsupportedError(f"attention backend {backend!r}: {reason}")
    if keys is not None and keys.address is not None and not BACKENDS[backend].by_address:
        raise UnsupportedError(f"attention backend {backend!r}: takes keys by no address")
    if q.shape[0] == 0:
        return torch.empty_like(q)
    return BACKENDS[backend].run(q, k, v, stage, keys, scale)


def available(
    device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> dict[str, str | None]:
    """Each backend with None where it would run on such tensors, else the reason why not."""
    found = checks.device("device", device)
    checks.dtype("dtype", dtype)
    return {
        name: backend.why_not(backend.phases[0], found, dtype, 64)
        for name, backend in BACKENDS.items()
    }


def graphable(
    phase: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int | None = None,
) -> bool:
    """Whether a graph may be captured of "auto" that serves any cache: what it takes is told no
    lengths by the host, but an upper bound, and of a cache only an address, by which Triton reads
    and writes. Where a GPU has nothing like it for 16 bits, a warning says why."""
    name, reasons = choose(phase, device, dtype, head_dim, block_size)
    lacks = lacks_triton(device)
    fits = phase in BACKENDS[name].graphed and lacks is None
    if device.type == "cuda" and dtype.itemsize == 2 and not fits:  # Python shows it once
        reasons |= {} if lacks is None else {"triton": lacks}
        why = "; ".join(f"{other} {reason}" for other, reason in reasons.items())
        warnings.warn(f"{phase} by {name}, and so without CUDA graphs: {why}", stacklevel=2)
    return fits


def _check(q: Tensor, k: Tensor, v: Tensor, stage: Rows, keys: Keys | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected floats, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    checks.has("stage", stage, "a stage such as plan.stages[0]", STAGE_FIELDS)
    if keys is not None and not isinstance(keys, PagedKeys):
        checks.instance("keys", keys, CachedKeys)
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        got = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"q, k, v: expected [T, Hq, D] and twice [Tk, Hkv, D], got {got}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected heads that divide q's {q.shape[1]}, got {k.shape[1]}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[0] != stage.num_tokens:
        raise ValueError(f"q: expected the stage's {stage.num_tokens} rows, got {q.shape[0]}")
    if keys is None:
        if k.shape[0] != stage.num_tokens:
            raise ValueError(f"k: expected the stage's {stage.num_tokens} rows, got {k.shape[0]}")
        return
    _check_keys(k, stage, keys)


def _check_keys(k: Tensor, stage: Rows, keys: Keys) -> None:
    if len(keys.lens) != len(stage.seq_lens):
        want = len(stage.seq_lens)
        raise ValueError(f"keys: expected {want} sequences, got {len(keys.lens)}")
    if any(n > m for n, m in zip(stage.seq_lens, keys.lens, strict=True)):
        raise ValueError(f"keys: expected at least the rows {stage.seq_lens}, got {keys.lens}")
    if isinstance(keys, CachedKeys):
        if any(start + n > k.shape[0] for start, n in zip(keys.starts, keys.lens, strict=True)):
            raise ValueError(f"keys: expected rows inside k's {k.shape[0]}, got {keys.starts}")
        return
    if k.shape[0] % keys.block_size:
        raise ValueError(f"k: expected blocks of {keys.block_size} rows, got {k.shape[0]} rows")
    blocks = -(-max(keys.lens, default=0) // keys.block_size)
    if keys.block_table.shape[0] != len(keys.lens) or keys.block_table.shape[1] < blocks:
        least, got = (len(keys.lens), blocks), tuple(keys.block_table.shape)
        raise ValueError(f"keys: expected a block table of at least {least}, got {got}")
