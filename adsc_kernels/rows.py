"""What every op checks first: its rows, and what says which of them move where."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from adsc_kernels import checks

_STRIDED = torch.strided


class Stage(Protocol):
    """What the ops need of a StagePlan: the movement of rows into a stage."""

    @property
    def segments(self) -> Tensor: ...  # int32 [S, 6], on the device of the rows

    @property
    def num_tokens(self) -> int: ...  # rows of the stage

    @property
    def num_tokens_in(self) -> int: ...  # rows of the stage before


def is_readable(x: Tensor) -> bool:
    """Whether the host can read what x holds, without a wait and outside of a graph."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(x, FakeTensor)
    )


def list_of(xs: Sequence[Tensor], name: str) -> list[Tensor]:
    """The members, which nobody has checked yet; a tensor is no list of its rows."""
    if type(xs) is list:
        return xs
    if isinstance(xs, Tensor | str) or not isinstance(xs, Iterable):
        raise TypeError(f"{name}: expected a list of tensors, got {checks.kind(xs)}")
    return list(xs)


def is_plain(x: Tensor) -> bool:
    """Whether `checks.tensor` has nothing to say: each call asks of each of its tensors."""
    return isinstance(x, Tensor) and x.layout == _STRIDED and not (x.is_quantized or x.is_nested)


def check_plain(x: Tensor, name: str) -> None:
    """Raises TypeError for what is no strided tensor of plain elements."""
    if not is_plain(x):
        checks.tensor(name, x)


def check_rows(x: Tensor, name: str) -> None:
    """x: [rows, ...], strided between rows at most."""
    check_plain(x, name)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension (rows first), got a scalar")
    if x.is_contiguous() or x.numel() == 0:
        return
    dense = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != dense:
            raise ValueError(
                f"{name}: expected rows that are contiguous inside (only dimension 0 may be "
                f"strided), got shape {tuple(x.shape)} with strides {tuple(x.stride())}"
            )
        dense *= size


def row_source(
    stage: Stage | None, keep_indices: Tensor | None, x: Tensor, name: str
) -> tuple[Tensor | None, int]:
    """The segment table (None with keep_indices) and the number of output rows."""
    if (stage is None) == (keep_indices is None):
        both = "both" if stage is not None else "neither"
        raise ValueError(f"stage, keep_indices: expected exactly one of them, got {both}")
    if keep_indices is not None:
        check_table(keep_indices, "keep_indices", (torch.int32, torch.int64), x, name)
        if keep_indices.dim() != 1:
            raise ValueError(
                f"keep_indices: expected shape [rows], got {tuple(keep_indices.shape)}"
            )
        _check_room(keep_indices.shape[0], x, name, "keep_indices")
        return None, keep_indices.shape[0]
    assert stage is not None  # for the type checker
    try:
        segments, num_tokens, num_rows = stage.segments, stage.num_tokens, stage.num_tokens_in
    except AttributeError:
        checks.stage("stage", stage)
        raise
    check_table(segments, "stage.segments", (torch.int32,), x, name)
    if segments.dim() != 2 or segments.shape[1] != 6:
        raise ValueError(f"stage.segments: expected shape [S, 6], got {tuple(segments.shape)}")
    if x.shape[0] != num_rows:
        raise ValueError(
            f"{name}: expected {num_rows} rows (stage.num_tokens_in), got {x.shape[0]}"
        )
    checks.integer("num_tokens", num_tokens, 0)
    if num_tokens > 0 and segments.shape[0] == 0:
        raise ValueError(
            f"segments: expected a table for {num_tokens} output rows, got an empty one"
        )
    _check_room(num_tokens, x, name, "segments")
    return segments, num_tokens


def movement(
    stage: Stage | None, keep_indices: Any, num_rows: int
) -> tuple[Tensor | None, Any, int]:
    """Which of num_rows rows move, as the ops take it; raises where `row_source` raises and a
    native op, which knows no stage, would not."""
    if stage is None:
        return None, keep_indices, keep_indices.shape[0]
    num_tokens = stage.num_tokens
    if type(num_tokens) is not int:
        checks.integer("num_tokens", num_tokens, 0)
    if stage.num_tokens_in != num_rows:
        raise ValueError(f"stage: expected one of {num_rows} rows, got {stage.num_tokens_in}")
    return stage.segments, keep_indices, num_tokens


def _check_room(num_tokens: int, x: Tensor, x_name: str, name: str) -> None:
    if num_tokens > 0 and x.shape[0] == 0:
        raise ValueError(
            f"{name}: expected no output rows, since their sources lie in [0, 0), got 0 rows in "
            f"{x_name} and {num_tokens} output rows"
        )


def check_table(
    table: Tensor, name: str, dtypes: tuple[torch.dtype, ...], x: Tensor, x_name: str
) -> None:
    """A contiguous tensor of one of the dtypes, where x is."""
    check_tensor(table, name, dtypes, x, x_name)
    if not table.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {table.stride()}")


def check_tensor(
    tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...], x: Tensor, x_name: str
) -> None:
    """`check_table` of any strides."""
    check_plain(tensor, name)
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(
            f"{name}: expected the device of {x_name}, {x.device}, got {tensor.device}"
        )
