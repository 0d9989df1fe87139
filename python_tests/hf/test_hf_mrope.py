"""Renumbered M-RoPE: the plain rule, the model's own for a smaller picture, and generation."""

from __future__ import annotations

import inspect
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from cache_name import CACHE
from hf_models import CASES, IMAGE, LAYERS, VIDEO, Row, noise
from hf_oracle import Axes, oracle, renumbered
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.hf import apply_adsc, mrope
from adsc_kernels.integrations.hf.compat import writes_where_told
from adsc_kernels.integrations.hf.layout import BatchLayout

SHARES = st.sampled_from(["1", "3/4", "2/3", "1/2", "1/3", "1/5", "0"])


class Prompt:
    """Tokens with positions by the model's rule, and where its images, frames and pictures lie."""

    def __init__(self) -> None:
        self.ids: list[Axes] = []
        self.kinds: list[int] = []
        self.images: list[list[list[int]]] = []
        self.pictures: list[list[int]] = []

    def at(self) -> int:
        return max((max(n) for n in self.ids), default=-1) + 1

    def text(self, count: int) -> None:
        at = self.at()
        self.ids += [(at + n,) * 3 for n in range(count)]
        self.kinds += [0] * count

    def picture(self, kind: int, frames: int, height: int, width: int, seconds: int) -> None:
        at, begin = self.at(), len(self.ids)
        for frame in range(frames):
            first = len(self.ids)
            self.images.append(
                [[first + r * width + c for c in range(width)] for r in range(height)]
            )
            time = at + frame * seconds
            self.ids += [(time, at + r, at + c) for r in range(height) for c in range(width)]
        self.kinds += [kind] * frames * height * width
        self.pictures.append(list(range(begin, len(self.ids))))


@st.composite
def prompts(draw: Any) -> Prompt:
    made = Prompt()
    made.text(draw(st.integers(1, 3)))
    for _ in range(draw(st.integers(0, 3))):
        frames, seconds = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (2, 5), (3, 9)]))
        kind, size = 2 if frames > 1 else 1, st.integers(1, 6)
        # An image may touch a video; two of one kind would be one picture.
        made.text(draw(st.integers(int(made.kinds[-1] == kind), 3)))
        made.picture(kind, frames, draw(size), draw(size), seconds)
    made.text(draw(st.integers(1, 3)))
    return made


@st.composite
def schedules(draw: Any) -> CompressionSchedule:
    pattern = draw(st.sampled_from(["start", "center", "linspace", "grid"]))
    shares = [
        f"{draw(SHARES)}x{draw(SHARES)}" if pattern == "grid" else draw(SHARES) for _ in range(2)
    ]
    return CompressionSchedule.parse(f"1:{shares[0]},2:{shares[1]}@{pattern}@renumber", LAYERS)


@settings(deadline=None, max_examples=40)
@given(st.lists(prompts(), min_size=1, max_size=3), schedules(), st.sampled_from("lrp"))
def test_positions_are_those_of_the_plain_rule(made, schedule, how):
    """Left- and right-padded, and packed into one row; and what follows any column goes on."""
    lens = [len(one.ids) for one in made]
    width = sum(lens) if how == "p" else max(lens)
    offsets = {"l": [width - n for n in lens], "r": [0] * len(made)}.get(how)
    offsets = [sum(lens[:n]) for n in range(len(made))] if offsets is None else offsets
    rows = [0] * len(made) if how == "p" else list(range(len(made)))
    ids = torch.zeros(3, rows[-1] + 1, width, dtype=torch.long)
    kinds = np.zeros((rows[-1] + 1, width), int)
    real, starts = np.zeros_like(kinds, dtype=bool), np.zeros_like(kinds, dtype=bool)
    spans = []
    for one, row, at in zip(made, rows, offsets, strict=True):
        ids[:, row, at : at + len(one.ids)] = torch.tensor(one.ids).T
        kinds[row, at : at + len(one.ids)] = one.kinds
        real[row, at : at + len(one.ids)] = True
        starts[row, at] = True
        for image in one.images:
            size = len(image), len(image[0])
            spans.append((row, at + image[0][0], size[0] * size[1], *size))
    starts = starts if how == "p" else None
    layout = BatchLayout(schedule, real, spans, starts)
    pictures = mrope.Pictures.of(spans, kinds, starts)
    columns = [stage.columns for stage in layout.stages]
    for (got, moved), stage in zip(mrope.renumbered(ids, pictures, columns), columns, strict=True):
        for one, row, at in zip(made, rows, offsets, strict=True):
            mine = (stage[row] >= at) & (stage[row] < at + len(one.ids))
            alive = (stage[row][mine] - at).tolist()
            want = renumbered(one.ids, one.pictures, alive)
            assert got[:, row, torch.from_numpy(mine)].T.tolist() == [list(n) for n in want]
            for end in range(1, len(one.ids) + 1):
                before = [p for p in one.pictures if p[-1] < end]
                kept = [n for n in alive if n < end]
                *_, probe = renumbered([*one.ids[:end], (99,) * 3], before, [*kept, end])
                assert int(moved[row, at + end - 1]) == 99 - probe[0]


def own_positions(model: Any, row: Row, sizes: list[tuple[int, int, int]]) -> torch.Tensor:
    """[3, T] by the model's get_rope_index, for pictures of (frames, height, width) tokens."""
    known = inspect.signature(model.base_model.get_rope_index).parameters
    grids = torch.tensor([[t, 2 * h, 2 * w] for t, h, w in sizes])
    videos = grids[:, 0] > 1
    arguments = {
        "input_ids": torch.tensor([row.ids]),
        "mm_token_type_ids": torch.tensor([row.types]),
        "image_grid_thw": grids[~videos] if (~videos).any() else None,
        "video_grid_thw": grids[videos] if videos.any() else None,
    }
    arguments = {name: value for name, value in arguments.items() if name in known}
    return model.base_model.get_rope_index(**arguments)[0][:, 0]


def prompt_of(sizes: list[tuple[int, int, int]], between: tuple[int, ...]) -> Row:
    row = Row().text(1, 11)
    for frames, height, width in sizes:
        row.text(7)
        for frame in range(frames):
            row.text(*(between if frame else ()))
            row.grid(height, width, IMAGE if frames == 1 else VIDEO)
        row.text(8, 12)
    return row


@pytest.mark.parametrize(
    ("name", "between"),
    [("qwen2_vl", ()), ("qwen2_5_vl", ()), ("qwen3_vl", (8, 30, 7))],
)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_grid_is_numbered_as_the_model_numbers_a_smaller_picture(models, name, between, data):
    """Videos whose rows or columns reach as far as their time: else transformers 5.17 to 5.24 let
    text begin within it."""
    model, seconds = models[name], 4 if name == "qwen2_5_vl" else 1
    half = Fraction(1, 2)
    sizes, smaller = [], []
    for frames in data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)):
        height = data.draw(st.integers(1, 5))
        width = data.draw(st.integers(1 if frames == 1 else 2 * frames * seconds, 25))
        sizes.append((frames, height, width))
        smaller.append((frames, ceil(height * half), ceil(width * half)))
    row, left = prompt_of(sizes, between), prompt_of(smaller, between)
    schedule = CompressionSchedule.parse("1:1/2x1/2@grid@renumber", LAYERS)
    spans = [
        (0, image[0][0], len(image) * len(image[0]), len(image), len(image[0]))
        for image in row.grids
    ]
    layout = BatchLayout(schedule, np.ones((1, len(row.ids)), bool), spans)
    pictures = mrope.Pictures.of(spans, np.array([row.types]), None)
    ids = own_positions(model, row, sizes)[:, None]
    columns = [stage.columns for stage in layout.stages]
    (same, _), (got, _) = mrope.renumbered(ids, pictures, columns)
    assert torch.equal(same, ids)
    assert torch.equal(got[:, 0], own_positions(model, left, smaller))


# ---- Generation ----

NAMES = ["qwen2_5_vl", "qwen3_vl"]
SCHEDULES = ["1:1/2,3:1/3@center@renumber", "0:1/2x2/3,2:1x1/2@grid@renumber"]
NEW, START = 5, 7
GREEDY: dict[str, Any] = dict(
    max_new_tokens=NEW,
    min_new_tokens=NEW,
    do_sample=False,
    pad_token_id=0,
    disable_compile=True,
    suppress_tokens=[IMAGE, VIDEO, START],  # 5.0 looks for a picture behind each start
)


@pytest.fixture(scope="module")
def models():
    return {name: CASES[name].model() for name in ("qwen2_vl", *NAMES)}


@pytest.fixture(params=NAMES)
def case(request, models):
    return CASES[request.param], models[request.param]


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("text", SCHEDULES)
@pytest.mark.parametrize("number", [0, 1])
def test_steps_go_on_where_the_stage_ends(case, text, number):
    """Each step's logits, of a batch with other rows, are those of the whole sequence."""
    made, model = case
    rows, schedule = made.rows(), CompressionSchedule.parse(text, LAYERS)
    with apply_adsc(model, schedule):
        out = model.generate(
            **made.inputs(rows), **GREEDY, return_dict_in_generate=True, output_logits=True
        )
    answer = out.sequences[number, -NEW:].tolist()
    for n in (1, NEW - 1):
        row = made.rows()[number].text(*answer[:n])
        want, _ = oracle(model, made.inputs([row]), row.grids, schedule)
        assert close(out.logits[n][number], want[-1])


@torch.no_grad()
@pytest.mark.skipif(writes_where_told(), reason="refused there")
@pytest.mark.parametrize("text", SCHEDULES)
def test_a_static_cache_and_beams_give_the_same(case, text):
    made, model = case
    inputs = made.inputs(made.rows())
    with apply_adsc(model, text):
        want = model.generate(**inputs, **GREEDY)
        got = model.generate(**inputs, **GREEDY, cache_implementation="static")
        assert torch.equal(got, want)
        beams = [
            model.generate(**inputs, **GREEDY, num_beams=2, use_cache=c) for c in (False, True)
        ]
        assert torch.equal(*beams)


@torch.no_grad()
@pytest.mark.parametrize("text", SCHEDULES)
def test_a_later_turn_is_the_whole_conversation(case, text):
    """Text alone, pictures, and text again; positions are the whole conversation's."""
    made, model = case
    schedule = CompressionSchedule.parse(text, LAYERS)
    row = made.rows()[0]
    first = len(row.ids)
    row.text(21, 22)
    row.text(7).grid(4, 5).text(8, 23, 24, 25)
    row.give(pixel_values=noise(5, 80, 96), image_grid_thw=torch.tensor([[1, 8, 10]]))
    inputs = made.inputs([row])
    sizes = [(1, 3, 4), (1, 2, 3), (1, 4, 5)]
    ids = own_positions(model, row, sizes)[:, None]
    want, _ = oracle(model, inputs, row.grids, schedule)
    pictures = row.inputs
    turns = [
        (0, first, {name: torch.cat(pictures[name][:2]) for name in pictures}),
        (first, first + 2, {}),
        (first + 2, len(row.ids) - 2, {name: pictures[name][2] for name in pictures}),
        (len(row.ids) - 2, len(row.ids), {}),
    ]
    cache = DynamicCache()
    with apply_adsc(model, schedule):
        for begin, end, more in turns:
            part = {n: x[:, begin:end] for n, x in inputs.items() if x.shape == (1, len(row.ids))}
            part = part | more | {"position_ids": ids[..., begin:end], CACHE: cache}
            got = model(**part).logits
    assert close(got[0, -1], want[-1])


@torch.no_grad()
@pytest.mark.parametrize("text", SCHEDULES)
def test_a_cache_is_cropped_behind_and_between_pictures(case, text):
    """What is run again gives what it gave."""
    made, model = case
    row = made.rows()[0]
    inputs = made.inputs([row])
    ids = own_positions(model, row, [(1, 3, 4), (1, 2, 3)])[:, None]
    with apply_adsc(model, text):
        for left in (len(row.ids) - 1, 17):
            cache = DynamicCache()
            want = model(**inputs, position_ids=ids, **{CACHE: cache}).logits
            cache.crop(left - len(row.ids))
            part = {n: x[:, left:] for n, x in inputs.items() if x.shape == (1, len(row.ids))}
            if left == 17:
                grids, pixels = row.inputs["image_grid_thw"], row.inputs["pixel_values"]
                part |= {"pixel_values": pixels[1], "image_grid_thw": grids[1]}
            got = model(**part, position_ids=ids[..., left:], **{CACHE: cache}).logits
            assert close(got[0, -1], want[0, -1])
