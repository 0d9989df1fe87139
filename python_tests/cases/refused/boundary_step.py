"""Calls of boundary_step, and the good arguments that they spoil."""
# ruff: noqa: E501 (tables of cases, one a line)

from collections.abc import Callable
from dataclasses import replace

import torch

from adsc_kernels import ops
from cases.boundary_step import drawn
from cases.rebuild_metadata import int32
from cases.segment_tables import stage_of

STAGE = stage_of([[0, 0, 2, 2, 0, 0], [2, 2, 5, 3, 0, 1]], 5, 7)
CU, SPANS = int32([0, 7], 2), int32([[0, 2, 5]], 1, 3)
LAYOUT = ops.BatchLayout(CU, SPANS, "1/2", num_tokens=7)  # two rows to spare
H, R, W = (drawn(7, 4)[name] for name in ("hidden", "residual", "weight"))
P = torch.arange(7)


def call(hidden: object = H, **options: object) -> Callable[..., object]:
    if not options.keys() & {"stage", "keep_indices", "layout"}:
        options["stage"] = STAGE
    return lambda: ops.boundary_step(hidden, **options)  # type: ignore[arg-type]


E4M3 = H.to(torch.float8_e4m3fn)
BAD_CALLS = {
    "residual alone": (call(residual=R), ValueError, "^residual, weight: .*only residual"),
    "weight alone": (call(weight=W), ValueError, "^residual, weight: .*only weight"),
    "no source": (lambda: ops.boundary_step(H), ValueError, "^stage, keep_indices: .*neither"),
    "two sources": (call(stage=STAGE, keep_indices=P), ValueError, "^stage, keep_indices: .*both"),
    "layout and stage": (call(stage=STAGE, layout=LAYOUT), ValueError, "^stage, keep_indices, layout: .*layout and stage"),
    "layout and indices": (call(keep_indices=P, layout=LAYOUT), ValueError, ".*layout and keep_indices"),
    "hidden not a tensor": (call(1.0), TypeError, "^hidden: .*float"),
    "hidden strides": (call(torch.zeros(4, 7).T), ValueError, "^hidden: .*contiguous inside"),
    "hidden fp8": (call(E4M3, residual=E4M3, weight=W), TypeError, "^hidden: .*got torch.float8_e4m3fn"),
    "hidden rows": (call(H[:6]), ValueError, "^hidden: expected 7 rows"),
    "residual shape": (call(residual=R[:, :3].clone(), weight=W), ValueError, r"^residual: .*\(7, 4\), got \(7, 3\)"),
    "residual dtype": (call(residual=R.double(), weight=W), TypeError, "^residual: .*dtype of hidden"),
    "weight length": (call(residual=R, weight=W[:3].clone()), ValueError, r"^weight: .*\(4,\), got \(3,\)"),
    "eps": (call(residual=R, weight=W, eps=-1.0), ValueError, "^eps: .*-1"),
    "others rows": (call(others=[P, P[:6]]), ValueError, r"^others\[1\]: expected 7 rows, as hidden, got 6"),
    "others device": (call(others=[P.to("meta")]), ValueError, r"^others\[0\]: .*cpu, got meta"),
    "others scalar": (call(others=[torch.tensor(1)]), ValueError, r"^others\[0\]: .*dimension"),
    "table": (call(stage=stage_of([[0, 3, 5, 5, 0, 0]], 5, 7)), ValueError, "^segments: row 0"),
    "indices": (call(keep_indices=P + 1), ValueError, "^keep_indices: .*got 7 at position 6"),
    "layout type": (call(layout=(CU, SPANS)), TypeError, "^layout: expected a BatchLayout, got tuple"),
    "num_tokens type": (call(layout=replace(LAYOUT, num_tokens=5.0)), TypeError, "^layout.num_tokens: expected an int, got 5.0"),
    "num_tokens negative": (call(layout=replace(LAYOUT, num_tokens=-1)), ValueError, "^layout.num_tokens: .*-1"),
    "num_tokens too small": (call(layout=replace(LAYOUT, num_tokens=4)), ValueError, "^num_tokens: .*the stage, 5, got 4"),
    "cu_seqlens past hidden": (call(H[:6], layout=LAYOUT), ValueError, "^cu_seqlens: .*rows of hidden, 6, got 7"),
    "cu_seqlens device": (call(H.to("meta"), layout=LAYOUT), ValueError, "^cu_seqlens: .*meta, got cpu"),
    "spans": (call(layout=replace(LAYOUT, spans=int32([[0, 3, 5]], 1, 3))), ValueError, "^spans: row 0"),
    "keep": (call(layout=replace(LAYOUT, keep="3/2")), ValueError, "^keep: "),
    "pattern": (call(layout=replace(LAYOUT, pattern="random")), ValueError, "^pattern: .*'random'"),
}  # fmt: skip
