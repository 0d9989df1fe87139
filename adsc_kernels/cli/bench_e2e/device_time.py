"""What the device does in a call, by kind of kernel, and how often the host asks it to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# In this order: flash-attn's names have CUTLASS's types in them.
KINDS = {
    "attention": r"flash|fmha|attention|attn",
    "gemm": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|dot_kernel",
    "norm": r"rms_?norm|layer_?norm",
    "boundary": r"downsample|boundary_step|compact|compress_step",
    "pointwise": r"rotate|silu_mul",
    "copy": r"memcpy|memset",
}
OTHER = "other"
LAUNCH = re.compile(r"cu(da)?(Launch|GraphLaunch|Memcpy\w*Async|Memset\w*Async)")
MOST_NAMES = 8  # of kernels that are told by name


def kind_of(kernel: str) -> str:
    """Of a kernel's name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return OTHER


def device_time(run: Callable[[], object], device: torch.device, times: int = 1) -> dict[str, Any]:
    """Of one of the `times` things that run does: `ms` in all and by kind, `kernels` on the device,
    `launches` by the host, and the `longest` kernels by name. Empty on a CPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize(device)
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    kernels = launches = 0
    for event in seen.events() or ():
        if event.device_type.name == "CUDA":
            ms = event.time_range.elapsed_us() / 1e3 / times
            by_kind[kind_of(event.name)] += ms
            by_name[event.name] += ms
            kernels += 1
        else:
            launches += LAUNCH.match(event.name) is not None
    return {
        "ms": round(sum(by_kind.values()), 4),
        "by_kind": {kind: round(ms, 4) for kind, ms in by_kind.most_common()},
        "kernels": kernels / times,
        "launches": launches / times,
        "longest": {name[:120]: round(ms, 4) for name, ms in by_name.most_common(MOST_NAMES)},
    }


def share_outside(found: dict[str, Any]) -> float | None:
    """Of the device's time, what is neither GEMM nor attention."""
    if not found:
        return None
    inside = sum(found["by_kind"].get(kind, 0.0) for kind in ("gemm", "attention"))
    return round(1 - inside / found["ms"], 4)
