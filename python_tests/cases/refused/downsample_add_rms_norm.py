"""Calls of downsample_add_rms_norm, and the good arguments that they spoil."""
# ruff: noqa: E501 (tables of cases, one a line)

from collections.abc import Callable

import torch

from adsc_kernels import ops
from cases.segment_tables import stage_of

STAGE = stage_of([[0, 0, 2, 2, 0, 0], [2, 2, 5, 3, 0, 1]], 5, 7)
X = torch.zeros(7, 4)
W = torch.ones(4)
Call = Callable[..., object]


def call(x: object = X, residual: object = X, weight: object = W, **options: object) -> Call:
    options = {"stage": STAGE, **options}
    return lambda: ops.downsample_add_rms_norm(x, residual, weight, **options)  # type: ignore[arg-type]


E4M3 = X.to(torch.float8_e4m3fn)
BAD_CALLS = {
    "fp8": (call(E4M3, E4M3, W.to(torch.float8_e4m3fn)), TypeError, "^x: .*float16, got torch.float8_e4m3fn"),
    "int": (call(X.int(), X.int(), W.int()), TypeError, "^x: .*got torch.int32"),
    "complex": (call(X + 0j, X + 0j, W + 0j), TypeError, "^x: .*got torch.complex64"),
    "x not a tensor": (call(1.0), TypeError, "^x: .*float"),
    "x one dimension": (call(X[:, 0].clone()), ValueError, r"^x: expected shape \[rows, hidden\]"),
    "x three dimensions": (call(X[None].expand(7, -1, -1).clone()), ValueError, r"^x: .*\(7, 7, 4\)"),
    "x strides": (call(torch.zeros(4, 7).T), ValueError, "^x: .*contiguous inside"),
    "residual dtype": (call(residual=X.double()), TypeError, "^residual: .*float32, got torch.float64"),
    "residual shape": (call(residual=X[:, :3].clone()), ValueError, r"^residual: .*\(7, 4\), got \(7, 3\)"),
    "residual device": (call(residual=X.to("meta")), ValueError, "^residual: .*cpu, got meta"),
    "residual strides": (call(residual=torch.zeros(4, 7).T), ValueError, "^residual: .*contiguous inside"),
    "weight not a tensor": (call(weight=None), TypeError, "^weight: expected a torch.Tensor, got None"),
    "weight length": (call(weight=W[:3].clone()), ValueError, r"^weight: .*\(4,\), got \(3,\)"),
    "weight dtype": (call(weight=W.double()), TypeError, "^weight: .*float32, got torch.float64"),
    "weight strides": (call(weight=torch.ones(8)[::2]), ValueError, "^weight: .*contiguous"),
    "weight device": (call(weight=W.to("meta")), ValueError, "^weight: .*cpu, got meta"),
    "eps": (call(eps=-1.0), ValueError, "^eps: .*-1"),
    "eps nan": (call(eps=float("nan")), ValueError, "^eps: .*nan"),
    "rows": (call(X[:6], X[:6]), ValueError, "^x: expected 7 rows"),
    "table": (call(stage=stage_of([[0, 3, 5, 5, 0, 0]], 5, 7)), ValueError, "^segments: row 0"),
}  # fmt: skip
