"""The Triton ops under opcheck and torch.compile: as for the native ones in test_compile.py."""

from dataclasses import replace

import pytest
import torch
from cases.compile import ROWS, SAMPLES, TABLE, batch_of, boundary, faked, fresh_dynamo, same, x
from cases.segment_tables import stage_of
from torch.library import opcheck

from adsc_kernels import ops
from adsc_kernels.backend import backend

__all__ = ["fresh_dynamo"]  # a fixture for every test


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    op, arguments = SAMPLES[name]
    twin = getattr(torch.ops.adsc_triton, op._qualified_op_name.partition("::")[2])
    opcheck(twin.default, arguments)


def test_one_graph_for_all_lengths() -> None:
    compiled = torch.compile(boundary, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (batch, text) in enumerate([(1, 11), (2, 30), (3, 7)]):
        stage = faked(batch, text)
        inputs = batch_of(stage)
        with backend("triton"), torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            outputs = compiled(*inputs, stage)
        same(outputs, boundary(*inputs, stage))


def test_gradients_of_a_graph() -> None:
    stage = stage_of([[0, 0, 3, 3, 0, 0], [3, 3, 6, 3, 0, 0]], 6, 9)
    mine, truth = x(9, 4), x(9, 4)
    compiled = torch.compile(
        lambda h: ops.downsample(h * 2, stage).square(), fullgraph=True, backend="aot_eager"
    )
    truth.data.copy_(mine.data)
    with backend("triton"):
        compiled(mine).sum().backward()
    ops.downsample(truth * 2, stage).square().sum().backward()
    torch.testing.assert_close(mine.grad, truth.grad)


def test_a_wrong_table_is_an_error() -> None:
    """The public op says so: the launchers check nothing again."""
    table, rows = TABLE, ROWS
    stage = stage_of([[0, 0, 9, 4, 0, 0]], 4, 9)
    for x_, changes, indices, error, message in [
        (x(9), {}, rows, ValueError, "^stage, keep_indices: .*both"),
        (x(9), None, None, ValueError, "^stage, keep_indices: .*neither"),
        (x(9), {"segments": table.long()}, None, TypeError, "^stage.segments: .*int64"),
        (x(9), {"segments": table[:, :5]}, None, ValueError, "^stage.segments: .*contiguous"),
        (
            x(9),
            {"segments": table[:, :5].clone()},
            None,
            ValueError,
            r"^stage.segments: .*\[S, 6\]",
        ),
        (x(9), {"segments": table[:0]}, None, ValueError, "^segments: .*4 output rows.*empty"),
        (x(9), {"num_tokens": -1}, None, ValueError, "^num_tokens: .*-1"),
        (x(0), {"num_tokens_in": 0}, None, ValueError, "^segments: .*0 rows in x"),
        (x(9), None, rows.float(), TypeError, "^keep_indices: .*float32"),
        (x(9), None, rows[None], ValueError, "^keep_indices: .*shape"),
        (x(0, 3), None, rows, ValueError, "^keep_indices: .*0 rows in x"),
        (x(9, 4, 4).transpose(1, 2), None, rows, ValueError, "^x: .*contiguous inside"),
    ]:
        wrong = None if changes is None else replace(stage, **changes)
        with backend("triton"), pytest.raises(error, match=message):
            ops.downsample(x_, wrong, keep_indices=indices)
