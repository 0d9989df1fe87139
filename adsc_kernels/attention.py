"""Variable-length causal attention: flash-attn, else PyTorch's own varlen flash, else SDPA.

Queries are packed by a stage's `cu_seqlens`. Keys are the same packed rows (a prompt run whole), or
lie in a cache, where each sequence has a stretch of its own that it need not fill (`CachedKeys`).
The causal mask is aligned bottom-right: the last query row of a sequence sees all of its keys.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adsc_kernels import checks
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.plan import to_device

BACKENDS = ("flash_attn", "torch_varlen", "sdpa")  # in the order in which "auto" tries them
STAGE_FIELDS = ("cu_seqlens", "seq_lens", "max_seqlen", "num_tokens")


class Rows(Protocol):
    """What attention asks of a stage: where each sequence's query rows lie."""

    @property
    def cu_seqlens(self) -> Tensor: ...

    @property
    def seq_lens(self) -> tuple[int, ...]: ...

    @property
    def max_seqlen(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class CachedKeys:
    """Where each sequence's keys lie: rows starts[b] .. starts[b] + lens[b] of a cache.

    The varlen kernels know cumulative lengths, but no unused capacity. So the gap behind each
    sequence's keys is told to them as one more sequence, of keys that no query row asks for:
    `cu_seqlens_q` and `cu_seqlens_k` (int32, [2B + 1]) list sequence, gap, sequence, gap ...
    """

    starts: tuple[int, ...]
    lens: tuple[int, ...]
    max_len: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @classmethod
    def build(
        cls,
        q_lens: Sequence[int],
        lens: Sequence[int],
        capacities: Sequence[int],
        device: torch.device,
    ) -> CachedKeys:
        """Of each sequence its query rows, its keys, and the cache rows that it owns.

        Raises ValueError where these don't fit together, as a cache of ``lens`` above
        ``capacities``.
        """
        if not len(q_lens) == len(lens) == len(capacities):
            got = f"{len(q_lens)}, {len(lens)} and {len(capacities)}"
            raise ValueError(f"q_lens, lens, capacities: expected one for each sequence, got {got}")
        for rows, length, capacity in zip(q_lens, lens, capacities, strict=True):
            if rows < 0 or not 0 <= length <= capacity:
                got = f"q_lens {rows}, lens {length}, capacities {capacity}"
                raise ValueError(f"lens: expected 0 <= lens <= capacities, got {got}")
        starts: list[int] = []
        cu_q, cu_k = [0], [0]
        for rows, length, capacity in zip(q_lens, lens, capacities, strict=True):
            starts.append(cu_k[-1])
            cu_q += [cu_q[-1] + rows] * 2
            cu_k += [starts[-1] + length, starts[-1] + capacity]
        both = to_device(np.array([cu_q, cu_k], np.int32), device)
        return cls(tuple(starts), tuple(lens), max(lens, default=0), both[0], both[1])


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Rows,
    *,
    keys: CachedKeys | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of each sequence's query rows over its own keys.

    Args:
        q: [T, Hq, D], rows packed by `stage.cu_seqlens`.
        k, v: [T, Hkv, D] packed like q, or with `keys` the cache [capacity, Hkv, D]; Hkv divides
            Hq.
        stage: a StagePlan, or anything with cu_seqlens, seq_lens, max_seqlen and num_tokens.
        keys: where each sequence's keys lie in the cache; None means packed like the queries.
        scale: of the scores; None means 1/sqrt(D).
        backend: "auto" or one of BACKENDS.

    Returns: [T, Hq, D].

    Raises: ValueError on shapes that don't fit, TypeError on mixed dtypes, UnsupportedError where
        the backend asked for can't do this call (it says why).
    """
    checks.choice("backend", backend, ("auto", *BACKENDS))
    if scale is not None:
        checks.number("scale", scale)
    _check(q, k, v, stage, keys)
    run = _choose(q, backend)
    if q.shape[0] == 0:
        return torch.empty_like(q)
    return run(q, k, v, stage, keys, scale)


def available(
    device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> dict[str, str | None]:
    """Each backend with None where it would run on such tensors, else the reason why not."""
    found = checks.device("device", device)
    checks.dtype("dtype", dtype)
    return {name: _why_not(name, found, dtype, head_dim=64) for name in BACKENDS}


def reads_lengths_on_device(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether "auto" takes a backend that a graph may be captured of: one that the host tells no
    lengths, but an upper bound. Where a GPU has none, a warning says why."""
    reasons = {name: _why_not(name, device, dtype, head_dim) for name in BACKENDS if name != "sdpa"}
    if None in reasons.values():
        return True
    if device.type == "cuda":  # Python shows it once
        why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        warnings.warn(f"attention by SDPA, and so without CUDA graphs: {why}", stacklevel=2)
    return False


def _check(q: Tensor, k: Tensor, v: Tensor, stage: Rows, keys: CachedKeys | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected floats, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    checks.has("stage", stage, "a stage such as plan.stages[0]", STAGE_FIELDS)
    if keys is not None:
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
    if len(keys.lens) != len(stage.seq_lens):
        want = len(stage.seq_lens)
        raise ValueError(f"keys: expected {want} sequences, got {len(keys.lens)}")
    if any(n > m for n, m in zip(stage.seq_lens, keys.lens, strict=True)):
        raise ValueError(f"keys: expected at least the rows {stage.seq_lens}, got {keys.lens}")
    if any(start + n > k.shape[0] for start, n in zip(keys.starts, keys.lens, strict=True)):
        raise ValueError(f"keys: expected rows inside k's {k.shape[0]}, got {keys.starts}")


def _choose(q: Tensor, backend: str) -> Callable[..., Tensor]:
    if backend == "auto":
        for name in BACKENDS:
            if _why_not(name, q.device, q.dtype, q.shape[2]) is None:
                return _RUN[name]
    reason = _why_not(backend, q.device, q.dtype, q.shape[2])
    if reason is not None:
        raise UnsupportedError(f"attention backend {backend!r}: {reason}")
    return _RUN[backend]


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if name == "sdpa":
        return None
    missing = _missing(name)
    if missing is not None:
        return missing
    if device.type != "cuda":
        return f"runs on CUDA, the tensors are on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, the tensors are {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"takes head sizes up to 256 in steps of 8, got {head_dim}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


@functools.cache
def _missing(name: str) -> str | None:
    """What the installed software lacks; asked once, since a decode step asks for every layer."""
    if name == "flash_attn":
        try:
            importlib.import_module("flash_attn")
        except ImportError as error:  # not installed, or built for another torch
            return f"flash-attn can't be imported ({error})"
        return None
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    known = inspect.signature(module.varlen_attn).parameters
    lacks = [p for p in ("window_size", "scale") if p not in known]
    return f"torch {torch.__version__}'s varlen_attn takes no {', '.join(lacks)}" if lacks else None


def _varlen_arguments(stage: Rows, keys: CachedKeys | None) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens_q, cu_seqlens_k, and upper bounds on the two lengths."""
    # At a bound of 1 and grouped heads flash-attn 2 folds the groups into the rows, for which each
    # sequence must have exactly one row: our gaps, and sequences that are done, have none.
    max_q = max(2, stage.max_seqlen)
    if keys is None:
        return stage.cu_seqlens, stage.cu_seqlens, max_q, stage.max_seqlen
    return keys.cu_seqlens_q, keys.cu_seqlens_k, max_q, keys.max_len


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, stage: Rows, keys: CachedKeys | None, scale: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_q, cu_k, max_q, max_k = _varlen_arguments(stage, keys)
    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True
    )


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, stage: Rows, keys: CachedKeys | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu_q, cu_k, max_q, max_k = _varlen_arguments(stage, keys)
    grouped: dict[str, Any] = {"enable_gqa": True} if _asks_for_groups() else {}
    causal = (-1, 0)  # no bound to the left, nothing to the right
    return varlen_attn(  # type: ignore[return-value]  # a pair only where return_aux asks for it
        q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=causal, **grouped
    )


@functools.cache
def _asks_for_groups() -> bool:
    """Whether varlen_attn is to be told of grouped heads: torch 2.11's takes them as they come."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, stage: Rows, keys: CachedKeys | None, scale: float | None
) -> Tensor:
    """One call per sequence: for CPU, float32, and machines without a varlen kernel."""
    outs = []
    first = 0
    for b, rows in enumerate(stage.seq_lens):
        start, length = (first, rows) if keys is None else (keys.starts[b], keys.lens[b])
        # is_causal aligns top-left, so it is right only where the keys are the queries' own rows.
        # A single row sees all keys.
        mask = None
        if 1 < rows != length:
            mask = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
        heads_first = (
            q[first : first + rows].transpose(0, 1)[None],
            k[start : start + length].transpose(0, 1)[None],
            v[start : start + length].transpose(0, 1)[None],
        )
        out = F.scaled_dot_product_attention(
            *heads_first,
            attn_mask=mask,
            is_causal=rows == length,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out[0].transpose(0, 1))
        first += rows
    return outs[0] if len(outs) == 1 else torch.cat(outs)


_RUN = {"flash_attn": _flash_attn, "torch_varlen": _torch_varlen, "sdpa": _sdpa}
