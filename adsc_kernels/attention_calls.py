"""How each kernel of attention is called, and what is lacking where it can't be.

All take q, k, v, stage, keys and scale, as `varlen_attention` has them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adsc_kernels.attention_keys import Keys, PagedKeys, Rows
from adsc_kernels.backend import constant_in_graphs, triton_runs
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.kv.tables import block_table_to_csr
from adsc_kernels.plan import to_device

# ---- flash-attn ------------------------------------------------------------------------------


@constant_in_graphs
def lacks_module(name: str, package: str) -> str | None:
    """What is wrong with an installed package; None where nothing is."""
    return _import_problem(name, package)


@functools.cache
def _import_problem(name: str, package: str) -> str | None:
    """Asked once, since a step of decoding asks for every layer."""
    try:
        importlib.import_module(name)
    except ImportError as error:  # not installed, or built for another torch
        return f"{package} can't be imported ({error})"
    return None


def arguments(stage: Rows, keys: Keys | None) -> dict[str, Any]:
    """The cumulative lengths of queries and keys, and upper bounds on either's longest."""
    # At a bound of 1 and grouped heads flash-attn 2 folds the groups into the rows, for which each
    # sequence must have exactly one row: our gaps, and sequences that are done, have none.
    longest = max(2, stage.max_seqlen)
    if keys is None:
        cu, of_keys = (stage.cu_seqlens, stage.cu_seqlens), stage.max_seqlen
    elif isinstance(keys, PagedKeys):
        cu, of_keys = (stage.cu_seqlens, keys.cu_seqlens_k), keys.max_len
    else:
        cu, of_keys = (keys.cu_seqlens_q, keys.cu_seqlens_k), keys.max_len
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (*cu, longest, of_keys), strict=True))


def flash_attn(module: str, options: Mapping[str, Any] | None = None) -> Callable[..., Tensor]:
    """All its versions have one function, of the same arguments but for `options`."""
    more = options or {}

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        stage: Rows,
        keys: Keys | None,
        scale: float | None,
    ) -> Tensor:
        function = importlib.import_module(module).flash_attn_varlen_func
        given = {**arguments(stage, keys), **more}
        if isinstance(keys, PagedKeys):
            k, v, given["block_table"] = *map(keys.in_blocks, (k, v)), keys.block_table
        out = function(q, k, v, **given, softmax_scale=scale, causal=True)
        return out if isinstance(out, Tensor) else out[0]  # some add the log-sum-exp

    return run


# ---- PyTorch ---------------------------------------------------------------------------------


@functools.cache
def _varlen_takes() -> tuple[str, ...] | None:
    """The parameters of PyTorch's varlen_attn; None where there is none."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    return tuple(inspect.signature(module.varlen_attn).parameters)


@constant_in_graphs
def lacks_varlen() -> str | None:
    """What PyTorch's varlen_attn lacks for us; None where nothing."""
    known = _varlen_takes()
    if known is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    lacks = [p for p in ("window_size", "scale") if p not in known]
    return f"torch {torch.__version__}'s varlen_attn takes no {', '.join(lacks)}" if lacks else None


@constant_in_graphs
def asks_for_groups() -> bool:
    """Whether varlen_attn is to be told of grouped heads: torch 2.11's takes them as they come."""
    return "enable_gqa" in (_varlen_takes() or ())


def torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Rows,
    keys: Keys | None,
    scale: float | None,
) -> Tensor:
    """PyTorch's own flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = arguments(stage, keys).values()
    grouped: dict[str, Any] = {"enable_gqa": True} if asks_for_groups() else {}
    causal = (-1, 0)  # no bound to the left, nothing to the right
    return varlen_attn(  # type: ignore[return-value]  # a pair only where return_aux asks for it
        q, k, v, *lengths, scale=scale, window_size=causal, **grouped
    )


@constant_in_graphs
def lacks_cudnn() -> str | None:
    """Why PyTorch's SDPA has no cuDNN to run on; None where it has."""
    version = torch.backends.cudnn.version() or 0
    return None if version >= 90000 else f"cuDNN 9 isn't there (version {version})"


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, stage: Rows, keys: Keys | None, scale: float | None
) -> Tensor:
    """Packed rows as they lie, since sequences of one length are a batch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if keys is not None or len(set(stage.seq_lens)) > 1 or q.shape != k.shape:
        what = "whole prompts of one length, with as many heads of keys as of queries"
        got = f"{stage.seq_lens} rows, {q.shape[1]} and {k.shape[1]} heads"
        cached = "" if keys is None else ", over a cache"
        raise UnsupportedError(f"attention backend 'cudnn': takes {what}, got {got}{cached}")
    query, key, value = (
        x.unflatten(0, (len(stage.seq_lens), -1)).transpose(1, 2) for x in (q, k, v)
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Rows,
    keys: Keys | None,
    scale: float | None,
) -> Tensor:
    """One call per sequence: for CPU, float32, and machines without a varlen kernel."""
    outs = []
    first = 0
    for b, rows in enumerate(stage.seq_lens):
        if isinstance(keys, PagedKeys):
            length = keys.lens[b]
            blocks = keys.block_table[b, : -(-length // keys.block_size)]
            found = (keys.in_blocks(x).index_select(0, blocks) for x in (k, v))
            mine = [x.flatten(0, 1)[:length] for x in found]
        else:
            start, length = (first, rows) if keys is None else (keys.starts[b], keys.lens[b])
            mine = [x[start : start + length] for x in (k, v)]
        # is_causal aligns top-left, so it is right only where the keys are the queries' own rows.
        # A single row sees all keys.
        mask, causal = None, False
        if rows == length:
            causal = True
        elif rows > 1:
            mask = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
        query, key, value = (x.transpose(0, 1)[None] for x in (q[first : first + rows], *mine))
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out[0].transpose(0, 1))
        first += rows
    return outs[0] if len(outs) == 1 else torch.cat(outs)


# ---- FlashInfer and our own ------------------------------------------------------------------


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(128 << 20, dtype=torch.uint8, device=device)


def flashinfer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Rows,
    keys: Keys | None,
    scale: float | None,
) -> Tensor:
    """Planned on the host, which waits for the lengths: so only where it is asked for by name."""
    module = importlib.import_module("flashinfer")
    heads = (q.shape[1], k.shape[1], q.shape[2])
    options = {"sm_scale": scale, "q_data_type": q.dtype, "kv_data_type": k.dtype}
    space = _workspace(q.device)
    if isinstance(keys, PagedKeys):
        size = keys.block_size
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
        indices, indptr = block_table_to_csr(keys.block_table, [-(-n // size) for n in keys.lens])
        last = np.array([n and (n - 1) % size + 1 for n in keys.lens], np.int32)
        of_keys = (indptr, indices, to_device(last, q.device))
        wrapper.plan(stage.cu_seqlens, *of_keys, *heads, size, causal=True, **options)
        given: tuple[Any, ...] = ((keys.in_blocks(k), keys.in_blocks(v)),)
    else:
        wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(space, "NHD")
        lengths = list(arguments(stage, keys).values())[:2]
        wrapper.plan(*lengths, *heads, causal=True, **options)
        given = (k, v)
    out: Tensor = wrapper.run(q, *given)
    return out


def triton_step(
    q: Tensor, k: Tensor, v: Tensor, stage: Rows, keys: Keys, scale: float | None
) -> Tensor:
    """Our own, of a step of decoding."""
    from adsc_kernels.triton.decode_attention import decode_attention

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride()[1:] != (x.shape[2], 1):
            raise ValueError(f"{name}: expected rows contiguous inside, got strides {x.stride()}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    bounds = keys.bounds if isinstance(keys, PagedKeys) else keys.cu_seqlens_k
    blocks = (keys.block_table, keys.block_size) if isinstance(keys, PagedKeys) else None
    return decode_attention(
        q, k, v, bounds, keys.max_len, scale, address=keys.address, blocks=blocks
    )


def lacks_triton(device: torch.device) -> str | None:
    """Why no kernel of ours in Triton runs there; None where it does."""
    if triton_runs(device):
        return None
    return f"Triton doesn't serve tensors on {device} here, or the backend in force leaves it out"
