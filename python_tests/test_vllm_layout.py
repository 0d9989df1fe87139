"""The vLLM plug-in's arithmetic, which needs no vLLM: positions, survivors and KV groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_oracle import kept

from adsc_kernels import CompressionSchedule
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.vllm.groups import choose_grouping, group_size
from adsc_kernels.integrations.vllm.layout import Layouts, RequestLayout, aligned_schedule
from adsc_kernels.integrations.vllm.spans import llava_onevision_spans


def schedule(text: str, layers: int = 32) -> CompressionSchedule:
    return CompressionSchedule.parse(text, layers)


@settings(deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=4),
    shares=st.lists(st.sampled_from(["1/2", "1/3", "3/4", "1", "0", "1/64"]), max_size=3),
    pattern=st.sampled_from(["start", "center", "linspace"]),
)
def test_layout_counts_what_the_oracle_keeps(gaps, shares, pattern):
    rule = schedule(",".join(f"{2 * n}:{s}" for n, s in enumerate(shares)) + f"@{pattern}")
    spans, end = [], 0
    for gap, length in gaps:
        spans.append((end + gap, length))
        end += gap + length
    layout = RequestLayout(rule, tuple(spans))
    images = [list(range(start, start + length)) for start, length in spans]
    vision = {i for image in images for i in image}
    total = end + 5
    for stage in range(rule.num_stages):
        if stage:
            keep = rule.boundaries[stage - 1].keep
            images = [[image[i] for i in kept(pattern, len(image), keep)] for image in images]
        left = sorted({i for i in range(total) if i not in vision}.union(*images))
        for position in range(total + 1):
            assert layout.kept_before(stage, position) == sum(i < position for i in left)
        for index, position in enumerate(left):
            assert layout.position_of(stage, index) == position


def test_layouts_are_shared():
    layouts = Layouts(schedule("8:1/4"), lambda prompt, images: tuple(images))
    assert layouts.of([], [(3, 16)]) is layouts.of([1], [(3, 16)])
    assert layouts.of(None, []).dropped == (0, 0)


def test_images_that_cannot_be_placed():
    """Taken for text by every process alike, with the reason."""
    layouts = Layouts(schedule("8:1/2x1/2@grid"), lambda prompt, images: tuple(images))
    layout, reason = layouts.read([], [(3, 16, 4, 4)])
    assert (layout.dropped, reason) == ((0, 12), "")
    layout, reason = layouts.read([], [(3, 17)])  # no rows and columns
    assert layout is layouts.of(None, []) is layouts.of([], [(3, 17)])
    assert reason.startswith("ValueError: ")


def test_alignment():
    image = (0, 576, 24, 24)
    better = aligned_schedule(schedule("8:1/4,16:1/4,24:1/4"), image, 16)
    assert all((576 - n) % 16 == 0 for n in better.kept(576))
    assert better.kept(576) == (576, 144, 48, 16)
    assert aligned_schedule(schedule("8:1/2x1/2@grid"), image, 16) is None
    layout = RequestLayout(schedule("8:1/4,16:1/4,24:1/4"), (image,), 16)
    assert layout.dropped == (0, 432, 528, 560)


# Layers of buckets, and of a group: what vLLM makes of them.
@pytest.mark.parametrize(
    ("buckets", "size"), [((8, 8, 8, 8), 8), ((13, 19), 19), ((2, 30), 2), ((3, 14, 15), 3)]
)
def test_group_size(buckets, size):
    assert group_size(buckets) == size


@pytest.mark.parametrize(
    ("text", "fraction", "groups", "padding"),
    [
        ("8:1/4,16:1/4,24:1/4", 0.436, 4, 0),
        ("4:1/3,20:1/3", 0.442, 8, 0),
        ("16:1/4", 0.686, 2, 0),
        ("2:1/2", 0.608, 16, 0),
        ("1:1/9", 0.279, 32, 0),
        # Uneven stages: in 32 groups of a layer it would be 0.442, 0.669 and 0.524; as vLLM cuts
        # them 0.483, 0.856 and 0.643.
        ("5:1/3,17:1/3", 0.483, 7, 3),
        ("13:1/3", 0.727, 5, 3),
        ("5:1/2,16:1/2,27:1/2", 0.593, 12, 4),
    ],
)
def test_grouping(text, fraction, groups, padding):
    rule = schedule(text)
    lengths = [n + 101 for n in rule.kept(576)]
    found = choose_grouping(rule, lengths, 16)
    assert found.fraction(rule, lengths, 16) == pytest.approx(fraction, abs=0.0005)
    assert (sum(found.groups), found.padding(rule)) == (groups, padding)


def test_onevision_spans():
    """Tiles by their newlines, frames of half the side; what has no grid is no span, or refused."""
    vision = SimpleNamespace(image_size=10, patch_size=2)  # 5 x 5, of a frame 3 x 3
    read = llava_onevision_spans(SimpleNamespace(vision_config=vision, image_token_index=7))

    def item(modality, offset, length):
        where = SimpleNamespace(offset=offset, length=length, is_embed=None)
        return SimpleNamespace(modality=modality, mm_position=where)

    film, overview = [8] * 19, [7] * 25  # two frames; and what an image begins with
    tiles, lines = [7, 7, 0] * 4, [0] * 4  # four rows of two tokens, and of none
    prompt = [1, *film, *overview, *tiles, 1, *overview, *lines, *overview]
    items = [item("image", 20, 37), item("video", 1, 19), item("image", 58, 29)]
    assert read(prompt, [*items, item("image", 87, 25)]) == (
        (1, 9, 3, 3),
        (10, 9, 3, 3),
        (20, 25, 5, 5),
        (45, 12, 4, 2),
        (58, 25, 5, 5),
        (87, 25, 5, 5),
    )
    with pytest.raises(UnsupportedError, match="frames of 9 tokens and a newline, got 18"):
        read(prompt, [item("video", 1, 18)])
