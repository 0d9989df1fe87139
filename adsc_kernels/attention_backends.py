"""The kernels that attention can run on: what each of them takes, and how it is called.

Every one of them reads packed rows by cumulative lengths, or by itself makes of them what it reads.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adsc_kernels.attention_keys import Keys, PagedKeys, Rows
from adsc_kernels.backend import constant_in_graphs, triton_runs
from adsc_kernels.kv.tables import block_table_to_csr
from adsc_kernels.plan import to_device

PREFILL = "prefill"  # any number of query rows
DECODE = "decode"  # one of each sequence, over keys in a cache


@dataclass(frozen=True)
class Backend:
    """What a backend takes.

    Attributes:
        run: q, k, v, stage, keys and scale, as `varlen_attention` has them, to its result.
        lacks: what the software that is installed lacks for it, on a device; None: nothing.
        phases: what it is for.
        dtypes, head_dims, capability (from and to): None takes any, and any device.
        on_device: it reads lengths on the device, so that a CUDA graph may be captured of it.
        by_address: it finds the keys by `CachedKeys.address`, so that one graph serves all caches.
        shares: it cuts the keys of few long sequences into shares that run at once.
        paged: it takes a cache in blocks of a multiple of so many rows; None: in none.
    """

    run: Callable[..., Tensor]
    lacks: Callable[[torch.device], str | None]
    phases: tuple[str, ...] = (PREFILL, DECODE)
    dtypes: tuple[torch.dtype, ...] | None = (torch.float16, torch.bfloat16)
    head_dims: Sequence[int] | None = range(8, 257, 8)
    capability: tuple[tuple[int, int], tuple[int, int]] | None = ((8, 0), (99, 9))
    on_device: bool = True
    by_address: bool = False
    shares: bool = False
    paged: int | None = None

    def why_not(
        self,
        phase: str,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        block_size: int | None = None,
    ) -> str | None:
        """Why it doesn't run a call; None where it does."""
        if phase not in self.phases:
            return f"is for {' and '.join(self.phases)}, this is {phase}"
        lacks = self.lacks(device)
        if lacks is not None:
            return lacks
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {self.takes_dtypes}, the tensors are {dtype}"
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"takes head sizes {self.takes_head_dims}, got {head_dim}"
        if block_size is not None and (self.paged is None or block_size % self.paged):
            return f"takes {self.takes_blocks}, the cache is in blocks of {block_size}"
        if self.capability is None:
            return None
        if device.type != "cuda":
            return f"runs on CUDA, the tensors are on {device.type}"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        found = torch.cuda.get_device_capability(device)
        if not self.capability[0] <= found <= self.capability[1]:
            return f"needs compute capability {self.takes_capability}, got {found[0]}.{found[1]}"
        return None

    @property
    def takes_dtypes(self) -> str:
        """In words, as the two below."""
        return ", ".join(str(d).removeprefix("torch.") for d in self.dtypes or ()) or "any"

    @property
    def takes_head_dims(self) -> str:
        sizes = self.head_dims
        if isinstance(sizes, range):
            step = f" in steps of {sizes.step}" if sizes.step > 1 else ""
            return f"up to {sizes[-1]}{step}"
        return ", ".join(map(str, sizes or ())) or "any"

    @property
    def takes_blocks(self) -> str:
        sizes = {None: "no blocks", 1: "blocks of any size"}
        return sizes.get(self.paged, f"blocks of a multiple of {self.paged} rows")

    @property
    def graphed(self) -> list[str]:
        """The phases in which a graph may be captured of it: see `attention.graphable`."""
        prompts = [PREFILL] if self.on_device and PREFILL in self.phases else []
        return prompts + ([DECODE] if self.by_address else [])

    @property
    def takes_capability(self) -> str:
        if self.capability is None:
            return "any device"
        (low, _), (high, _) = self.capability
        return f"{low}.x" if low == high else f"{low}.0 or newer"


def choose(
    phase: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int | None = None,
) -> tuple[str, dict[str, str]]:
    """The first backend that runs such a call, and why those before it don't."""
    reasons: dict[str, str] = {}
    for name in ORDER[phase]:
        reason = BACKENDS[name].why_not(phase, device, dtype, head_dim, block_size)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    raise AssertionError("sdpa runs anywhere")


# ---- flash-attn ------------------------------------------------------------------------------


@constant_in_graphs
def _lacks_module(name: str, package: str) -> str | None:
    return _import_problem(name, package)


@functools.cache
def _import_problem(name: str, package: str) -> str | None:
    """Asked once, since a step of decoding asks for every layer."""
    try:
        importlib.import_module(name)
    except ImportError as error:  # not installed, or built for another torch
        return f"{package} can't be imported ({error})"
    return None


def _arguments(stage: Rows, keys: Keys | None) -> dict[str, Any]:
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


def _flash_attn(
    module: str, package: str, options: Mapping[str, Any] | None = None, **limits: Any
) -> Backend:
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
        given = {**_arguments(stage, keys), **more}
        if isinstance(keys, PagedKeys):
            k, v, given["block_table"] = *map(keys.in_blocks, (k, v)), keys.block_table
        out = function(q, k, v, **given, softmax_scale=scale, causal=True)
        return out if isinstance(out, Tensor) else out[0]  # some add the log-sum-exp

    return Backend(run, lambda device: _lacks_module(module, package), **limits)


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
def _lacks_varlen() -> str | None:
    known = _varlen_takes()
    if known is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    lacks = [p for p in ("window_size", "scale") if p not in known]
    return f"torch {torch.__version__}'s varlen_attn takes no {', '.join(lacks)}" if lacks else None


@constant_in_graphs
def asks_for_groups() -> bool:
    """Whether varlen_attn is to be told of grouped heads: torch 2.11's takes them as they come."""
    return "enable_gqa" in (_varlen_takes() or ())


def _torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Rows,
    keys: Keys | None,
    scale: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    lengths = _arguments(stage, keys).values()
    grouped: dict[str, Any] = {"enable_gqa": True} if asks_for_groups() else {}
    causal = (-1, 0)  # no bound to the left, nothing to the right
    return varlen_attn(  # type: ignore[return-value]  # a pair only where return_aux asks for it
        q, k, v, *lengths, scale=scale, window_size=causal, **grouped
    )


def _sdpa(
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


def _flashinfer(
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
        lengths = list(_arguments(stage, keys).values())[:2]
        wrapper.plan(*lengths, *heads, causal=True, **options)
        given = (k, v)
    out: Tensor = wrapper.run(q, *given)
    return out


def _triton(
    q: Tensor, k: Tensor, v: Tensor, stage: Rows, keys: Keys, scale: float | None
) -> Tensor:
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


BACKENDS: dict[str, Backend] = {
    "flash_attn_3": _flash_attn(
        "flash_attn_interface",
        "flash-attn 3",
        {"num_splits": 0},  # as many as it finds right
        capability=((9, 0), (9, 9)),
        shares=True,
    ),
    "flash_attn_4": _flash_attn(
        "flash_attn.cute", "flash-attn 4", capability=((9, 0), (99, 9)), head_dims=range(8, 129, 8)
    ),
    "flash_attn": _flash_attn("flash_attn", "flash-attn 2", paged=256),
    "torch_varlen": Backend(_torch_varlen, lambda device: _lacks_varlen()),
    "triton": Backend(
        _triton,
        lacks_triton,
        phases=(DECODE,),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        head_dims=range(1, 257),
        capability=None,
        by_address=True,
        shares=True,
        paged=1,
    ),
    "flashinfer": Backend(
        _flashinfer,
        lambda device: _lacks_module("flashinfer", "FlashInfer"),
        head_dims=(64, 128, 256),
        on_device=False,
        paged=1,
    ),
    "sdpa": Backend(
        _sdpa,
        lambda device: None,
        dtypes=None,
        head_dims=None,
        capability=None,
        on_device=False,
        paged=1,
    ),
}
# Which "auto" tries, the first that runs a call taken. A step of decoding has one query row of each
# sequence, for which varlen kernels start a program for each sequence and head: few of them.
ORDER = {
    PREFILL: ("flash_attn_3", "flash_attn_4", "flash_attn", "torch_varlen", "sdpa"),
    DECODE: ("triton", "flash_attn_3", "flash_attn_4", "flash_attn", "torch_varlen", "sdpa"),
}
