"""make_plan on the host against the same tables in vectorised NumPy.

256 sequences x 8 images x 3 boundaries; the bound is 1 ms. Both start from Python lists
and end with arrays; no device is involved.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import adsc_kernels as adsc

SEQUENCES, IMAGES, IMAGE_TOKENS, TEXT = 256, 8, 576, 101
SCHEDULE = adsc.CompressionSchedule.parse("8:1/4,16:1/4,24:1/4", num_layers=32)


def layout() -> tuple[list[int], list[tuple[int, int, int]]]:
    pitch = IMAGE_TOKENS + TEXT
    spans = [(b, TEXT + i * pitch, IMAGE_TOKENS) for b in range(SEQUENCES) for i in range(IMAGES)]
    return [b * (TEXT + IMAGES * pitch) for b in range(SEQUENCES + 1)], spans


def numpy_plan(cu_seqlens, spans):
    """(cu_seqlens, segments) of each stage; the segments of text are not joined."""
    bounds, spans = np.asarray(cu_seqlens), np.asarray(spans)
    sequence, starts, lengths = spans.T
    # Pieces in order: the text before each image, the image, and the text at each sequence's end.
    ends = starts + lengths
    begins_sequence = np.diff(sequence, prepend=-1) > 0
    text_start = np.where(begins_sequence, 0, np.roll(ends, 1))
    last_end = np.zeros(len(bounds) - 1, np.int64)
    np.maximum.at(last_end, sequence, ends)
    owner = np.concatenate([sequence, sequence, np.arange(len(last_end))])
    start = np.concatenate([text_start, starts, last_end])
    count = np.concatenate([starts - text_start, lengths, np.diff(bounds) - last_end])
    vision = np.repeat([False, True, False], [len(spans), len(spans), len(last_end)])
    order = np.lexsort((start, owner))
    owner, count, vision = owner[order], count[order], vision[order]
    stages = [(bounds, None)]
    for boundary in SCHEDULE.boundaries:
        num, den = boundary.keep.numerator, boundary.keep.denominator
        kept = np.where(vision, -(-count * num // den), count)
        src, dst = np.cumsum(count) - count, np.cumsum(kept) - kept
        zero = np.zeros_like(src)
        segments = np.stack([dst, src, count, kept, zero, zero], 1)[kept > 0].astype(np.int32)
        rows = np.bincount(owner, kept, len(bounds) - 1).astype(np.int64)
        stages.append((np.concatenate([[0], np.cumsum(rows)]).astype(np.int32), segments))
        count = kept
    return stages


def test_they_agree():
    cu_seqlens, spans = layout()
    plan = adsc.make_plan(SCHEDULE, cu_seqlens, spans)
    for stage, (bounds, segments) in zip(plan.stages, numpy_plan(cu_seqlens, spans), strict=True):
        assert stage.cu_seqlens.tolist() == bounds.tolist()
        if segments is not None:
            rows = adsc._C.expand(segments, int(bounds[-1]))
            assert stage.keep_indices().tolist() == rows.tolist()
    assert all(a.num_tokens > b.num_tokens for a, b in pairwise(plan.stages))


@pytest.mark.benchmark(group="plan: 256 sequences x 8 images x 3 boundaries")
def test_plan(benchmark):
    benchmark(adsc.make_plan, SCHEDULE, *layout())


@pytest.mark.benchmark(group="plan: 256 sequences x 8 images x 3 boundaries")
def test_numpy(benchmark):
    benchmark(numpy_plan, *layout())
