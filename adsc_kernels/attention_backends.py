"""The kernels that attention can run on, and what each of them takes.

Every one of them reads packed rows by cumulative lengths, or by itself makes of them what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adsc_kernels import attention_calls as calls

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


def _flash_attn(module: str, package: str, options: Any = None, **limits: Any) -> Backend:
    run = calls.flash_attn(module, options)
    return Backend(run, lambda device: calls.lacks_module(module, package), **limits)


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
    "cudnn": Backend(
        calls.cudnn,
        lambda device: calls.lacks_cudnn(),
        phases=(PREFILL,),
        head_dims=range(8, 129, 8),
        capability=((9, 0), (99, 9)),
    ),
    "flash_attn": _flash_attn("flash_attn", "flash-attn 2", paged=256),
    "torch_varlen": Backend(calls.torch_varlen, lambda device: calls.lacks_varlen()),
    "triton": Backend(
        calls.triton_step,
        calls.lacks_triton,
        phases=(DECODE,),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        head_dims=range(1, 257),
        capability=None,
        by_address=True,
        shares=True,
        paged=1,
    ),
    "flashinfer": Backend(
        calls.flashinfer,
        lambda device: calls.lacks_module("flashinfer", "FlashInfer"),
        head_dims=(64, 128, 256),
        on_device=False,
        paged=1,
    ),
    "sdpa": Backend(
        calls.sdpa,
        lambda device: None,
        dtypes=None,
        head_dims=None,
        capability=None,
        on_device=False,
        paged=1,
    ),
}
# Which "auto" tries, the first that runs a call taken: neither FlashInfer, which waits, nor cuDNN,
# which makes a plan for every new shape, at a cost that nobody has measured yet. A step of decoding
# has one query row of each sequence, for which varlen kernels start a program for each sequence and
# head: few of them.
ORDER = {
    PREFILL: ("flash_attn_3", "flash_attn_4", "flash_attn", "torch_varlen", "sdpa"),
    DECODE: ("triton", "flash_attn_3", "flash_attn_4", "flash_attn", "torch_varlen", "sdpa"),
}
