"""The Triton ops under opcheck and torch.compile: as for the native ones in test_compile.py."""

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


def test_a_wrong_table_is_an_error_of_the_op_too() -> None:
    table, rows = TABLE, ROWS
    op = torch.ops.adsc_triton.downsample
    for arguments, message in [
        ((x(9), table, rows, 4), "^segments, keep_indices: .*both"),
        ((x(9), None, None, 4), "^segments, keep_indices: .*neither"),
        ((x(9), table.long(), None, 4), "^segments: .*int64"),
        ((x(9), table[:, :5], None, 4), "^segments: .*contiguous"),
        ((x(9), table[:0], None, 4), "^segments: .*got none"),
        ((x(9), None, rows.float(), 4), "^keep_indices: .*float32"),
        ((x(9), None, rows, 5), r"^keep_indices: .*\[5\]"),
        ((x(0, 3), None, rows, 4), "^keep_indices: .*without rows"),
        ((x(9), table, None, -1), "^num_tokens: .*-1"),
        ((x(9, 4, 4).transpose(1, 2), table, None, 6), "^xs: .*contiguous inside"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(*arguments)
