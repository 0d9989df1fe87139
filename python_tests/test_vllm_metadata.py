"""A step's rows, lengths and slots in the stages behind a boundary, against loops over the layouts.
No vLLM here."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.vllm import metadata
from adsc_kernels.integrations.vllm.layout import RequestLayout

BLOCK, WIDTH, REQUESTS = 4, 32, 6
SCHEDULES = [
    CompressionSchedule.parse(text, 8) for text in ("2:1/3,4:1/2", "1:1/64", "0:1/2,3:0", "2:1")
]


def make_batch(schedule: CompressionSchedule) -> metadata.Batch:
    batch = metadata.Batch(schedule, None)
    batch.allocate(REQUESTS, torch.device("cpu"))
    return batch


def step_of(batch, layouts, chunks, padding=0):
    """The step of these (begin, end) of the layouts' requests, and of so many rows of padding."""
    batch.rows = lambda: layouts
    chunks = [*chunks, *[(0, 0)] * padding]
    starts = np.cumsum([0, *(end - begin for begin, end in chunks)]).astype(np.int32)
    ends = torch.tensor([end for _, end in chunks], dtype=torch.int32)
    return batch.step(
        SimpleNamespace(
            query_start_loc=torch.from_numpy(starts).clone(),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=ends,
            seq_lens_cpu_upper_bound=ends.clone(),
        )
    )


def check(step, layouts, chunks, padding=0) -> None:
    """Row by row what the layouts say."""
    moves = max(end - begin for begin, end in chunks) > 1 and any(
        layout.cuts(*chunk) for layout, chunk in zip(layouts, chunks, strict=True)
    )
    assert (step.plan is not None) == moves
    table = torch.arange(len(chunks) * WIDTH, dtype=torch.int32).view(-1, WIDTH).flip(1) + 7
    for stage in range(1, len(layouts[0].dropped)):
        lens, counts, positions, slots, masked = [], [], [], [], []
        for b, (layout, (begin, end)) in enumerate(zip(layouts, chunks, strict=True)):
            kept, before = layout.kept_before(stage, end), layout.kept_before(stage, begin)
            if moves:
                of_rows = range(before, kept)
            else:  # rows stay, also where the last one's token is dropped
                first = max(kept, 1) - (end - begin)
                of_rows = range(first, max(kept, 1))
            if len(of_rows) or not moves:
                lens.append(kept if moves else max(kept, 1))
                counts.append(len(of_rows))
            positions += of_rows
            slots += [int(table[b, p // BLOCK]) * BLOCK + p % BLOCK for p in of_rows]
            masked += [not moves and kept == before] * len(of_rows)
        if step.untouched(stage):
            assert lens == [end for _, end in chunks] and not any(masked)
            assert step.seq_lens(stage).tolist() == lens + [0] * padding
            continue
        assert step.positions(stage).tolist() == positions
        whole = torch.cat([table, table.new_zeros(padding, WIDTH)])
        index, place = step.slots(stage, BLOCK, WIDTH)
        assert (whole.flatten()[index] * BLOCK + place).tolist() == slots
        mask = step.masked(stage)
        assert (mask is not None) == any(masked)
        assert mask is None or mask.tolist() == masked
        if not moves:
            lens += [0] * padding
            assert step.seq_lens(stage).tolist() == step.seq_lens_cpu(stage).tolist() == lens
            continue
        rows = step.rows(stage)
        assert (rows.num_tokens, rows.counts.tolist()) == (len(positions), counts)
        assert rows.seq_lens.tolist() == rows.seq_lens_cpu.tolist() == lens
        starts = [0, *accumulate(counts)]
        assert rows.query_start_loc.tolist() == rows.query_start_loc_cpu.tolist() == starts


@st.composite
def requests(draw):
    """Layouts of one schedule, and a chunk of each."""
    schedule, layouts, chunks = draw(st.sampled_from(SCHEDULES)), [], []
    whole = draw(st.booleans())  # else each of a token, as in a graph of decode steps
    for _ in range(draw(st.integers(1, REQUESTS - 1))):
        gaps = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), max_size=2))
        spans, end = [], 0
        for gap, length in gaps:
            spans.append((end + gap, length))
            end += gap + length
        layouts.append(RequestLayout(schedule, tuple(spans)))
        begin = draw(st.integers(0, end + 9))
        chunks.append((begin, begin + (draw(st.integers(1, 40)) if whole else 1)))
    return schedule, layouts, chunks


@settings(deadline=None)
@given(requests=requests(), padding=st.integers(0, 1))
def test_rows_of_a_step(requests, padding):
    schedule, layouts, chunks = requests
    if max(end - begin for begin, end in chunks) > 1:
        padding = 0  # only graphs of decode steps pad requests
    step = step_of(make_batch(schedule), layouts, chunks, padding)
    check(step, layouts, chunks, padding)


def test_steps_of_one_batch():
    """What the device was told stays while requests decode, and no longer."""
    schedule, uploads = SCHEDULES[0], []

    def counted(values, device):
        uploads.append(values)
        return torch.from_numpy(values)

    batch = make_batch(schedule)
    some = [RequestLayout(schedule, ((2, 30),)), RequestLayout(schedule, ())]
    steps = [
        (some, [(0, 40), (0, 9)], 1),
        (some, [(40, 41), (9, 10)], 1),
        (some, [(41, 42), (10, 11)], 0),
        (some, [(42, 43), (11, 12)], 0),
        (some[::-1], [(12, 13), (43, 44)], 1),
        (some[1:], [(13, 14)], 1),
        (some[1:], [(14, 16)], 1),  # a draft of a token
        ([*some[1:], some[0]], [(14, 15), (0, 1)], 1),
        ([*some[1:], some[0]], [(15, 16), (1, 2)], 0),
        ([*some[1:], some[0]], [(16, 17), (2, 3)], 0),  # an image's token, but every stage's
        ([*some[1:], some[0]], [(17, 18), (3, 4)], 2),  # one that is dropped: its mask too
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "to_device", counted)
        addresses = set()
        for layouts, chunks, expected in steps:
            uploads.clear()
            step = step_of(batch, layouts, chunks)
            check(step, layouts, chunks)
            assert len(uploads) == expected, chunks
            addresses.add(step.seq_lens(1).data_ptr())
        assert len(addresses) == 1


def test_lengths_known_to_the_device_alone():
    """A bound on the host, less a draft that was not accepted: rows and keys end where it does."""
    schedule = SCHEDULES[0]
    layout, batch = RequestLayout(schedule, ((2, 30),)), make_batch(schedule)
    batch.rows = lambda: [layout]
    step = batch.step(
        SimpleNamespace(
            query_start_loc=torch.tensor([0, 3], dtype=torch.int32),
            query_start_loc_cpu=torch.tensor([0, 3], dtype=torch.int32),
            seq_lens=torch.tensor([48], dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor([50], dtype=torch.int32),
        )
    )
    assert step.seq_lens(1).tolist() == [28]
    assert step.positions(1).tolist() == [25, 26, 27]
    assert step.seq_lens_cpu(1).tolist() == [30]
