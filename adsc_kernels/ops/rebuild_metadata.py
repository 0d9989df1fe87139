"""What a boundary makes of a batch's layout, computed from tensors alone: `rebuild_metadata`."""

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from adsc_kernels import checks, fakes
from adsc_kernels.ops._dispatch import call, choose, explain, native, register
from adsc_kernels.rows import check_table
from adsc_kernels.schedule import PATTERNS

Keep = Fraction | str | int | float | tuple[int, int]


@dataclass(frozen=True)
class MetadataStage:
    """A rebuilt stage as the ops take it: tensors from the device, row counts from the caller."""

    segments: Tensor
    num_tokens: int
    num_tokens_in: int


class Metadata(NamedTuple):
    """The stage that a boundary opens. All int32, on the device of cu_seqlens."""

    cu_seqlens: Tensor  # [B + 1]
    spans: Tensor  # [N, 3], or [N, 5] after a grid: what the next rebuild takes
    segments: Tensor  # [S, 6], S from shapes only; some segments are empty
    seq_lens: Tensor  # [B]: the rows of each sequence, FlashAttention 3's seqused
    num_tokens: Tensor  # []: the rows of the stage
    max_seqlen: Tensor  # []: the rows of the longest sequence

    def stage(self, num_tokens: int, num_tokens_in: int) -> MetadataStage:
        """This as the `stage` of `downsample` and its kind, which need row counts on the host.

        Those are known from the lengths and the schedule, without reading the device.
        """
        return MetadataStage(self.segments, num_tokens, num_tokens_in)


def rebuild_metadata(
    cu_seqlens: Tensor,
    spans: Tensor,
    keep: Keep | tuple[Keep, Keep],
    pattern: str = "start",
    max_height: int | None = None,
) -> Metadata:
    """The layout after one boundary, and the movement of rows into it.

    No value of a tensor is read on the host: this is what a captured graph, whose batch changes
    under it, runs in place of `make_plan`.

    cu_seqlens: contiguous int32 [B + 1], the rows of the stage before, by sequence.
    spans: contiguous int32 [N, 3]: sequence, start within the sequence, length; or [N, 5] with
      height and width, height * width == length. Sorted by sequence and start, without overlap.
    keep: what stays of each span, exact: a Fraction, "1/4", (1, 4), 0 or 1. For the pattern "grid"
      a pair of those: of the rows and of the columns.
    pattern: "start", "center", "linspace" or "grid".
    max_height: with "grid" the largest height that a span may have, which bounds the table: S is
      B + N * (1 + kept rows of max_height). For the other patterns None; S is B + 2 * N.
    Returns `Metadata`; feed its cu_seqlens and spans to the next boundary's call.

    Raises TypeError or ValueError naming the argument. What the tensors hold is checked on CPU
    only.
    """
    given = (cu_seqlens, spans, keep, pattern, max_height)
    op = native("rebuild_metadata", cu_seqlens)
    if op is None or type(keep) is not str or max_height is not None:
        fractions = check_layout(*given)
        chosen = choose("rebuild_metadata", cu_seqlens.device)
        arguments = (cu_seqlens, spans, as_ints(fractions), pattern, max_height or 0)
        return Metadata(*call(chosen, *arguments, grad=False))
    try:
        return Metadata(*op[False](cu_seqlens, spans, _ints_of(keep), pattern, 0))
    except Exception as error:
        explain(error, check_layout, *given)


def check_layout(
    cu_seqlens: Tensor,
    spans: Tensor,
    keep: Keep | tuple[Keep, Keep],
    pattern: str,
    max_height: int | None,
) -> list[Fraction]:
    """What stays: of the span, or of the grid's rows and of its columns. Raises as documented."""
    for name, tensor in (("cu_seqlens", cu_seqlens), ("spans", spans)):
        check_table(tensor, name, (torch.int32,), cu_seqlens, "cu_seqlens")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if spans.dim() != 2 or spans.shape[1] not in (3, 5):
        raise ValueError(f"spans: expected shape [N, 3] or [N, 5], got {tuple(spans.shape)}")
    checks.choice("pattern", pattern, PATTERNS)
    if pattern == "grid":
        if not isinstance(keep, tuple | list) or len(keep) != 2:
            raise TypeError(f"keep: expected a pair (rows, columns) for the grid, got {keep!r}")
        fractions = [exact_fraction(part) for part in keep]
        if spans.shape[1] != 5:
            raise ValueError(f"spans: expected shape [N, 5] for the grid, got {tuple(spans.shape)}")
        checks.integer("max_height", max_height, 0, checks.INT32_MAX)
    else:
        known = type(keep) is str and not torch.compiler.is_compiling()
        fractions = [_fraction_of(keep) if known else exact_fraction(keep)]
        if max_height is not None:
            raise ValueError(f"max_height: expected None but for the grid, got {max_height!r}")
    return fractions


def as_ints(fractions: list[Fraction]) -> list[int]:
    """Numerators and denominators, as the schema's `keep`."""
    return [part for f in fractions for part in (f.numerator, f.denominator)]


@functools.lru_cache(maxsize=128)
def _ints_of(keep: str) -> list[int]:
    return as_ints([exact_fraction(keep)])


@functools.lru_cache(maxsize=128)
def _fraction_of(keep: str) -> Fraction:
    return exact_fraction(keep)


def exact_fraction(keep: object) -> Fraction:
    """keep as a Fraction in [0, 1]. Raises TypeError or ValueError."""
    forms = 'a Fraction, "1/4", (1, 4), 0 or 1'
    try:
        parts = keep if isinstance(keep, tuple) else (keep,)
        whole = len(parts) == 1  # a pair is two ints
        if any(isinstance(n, bool) or not (whole or isinstance(n, int)) for n in parts):
            raise TypeError(f"keep: expected {forms}, got {keep!r}")
        if isinstance(keep, tuple) and len(keep) == 2:
            fraction = Fraction(*keep)
        elif isinstance(keep, Fraction | str) or keep in (0, 1):
            fraction = Fraction(keep)
        else:
            raise TypeError(f"keep: expected {forms}, got {keep!r}")
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"keep: expected {forms}, got {keep!r}") from None
    # In ints: Dynamo does not compare Fractions before torch 2.12.
    if not 0 <= fraction.numerator <= fraction.denominator < 1 << 31:
        raise ValueError(f"keep: expected a fraction in [0, 1], got {keep!r}")
    return fraction


register(
    "rebuild_metadata",
    "(Tensor cu_seqlens, Tensor spans, int[] keep, str pattern, SymInt max_height) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=fakes.rebuild_metadata,
    triton="rebuild_metadata",
)
