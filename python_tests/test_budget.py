"""Schedules for a budget: against trying every schedule there is."""

from fractions import Fraction
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc_kernels import CompressionSchedule
from adsc_kernels.accounting import ModelShape, account
from adsc_kernels.budget import KEEP, PRESETS, search

for_budget = CompressionSchedule.for_budget


def average(schedule: CompressionSchedule, tokens: int, *grid: int) -> Fraction:
    kept = schedule.kept(tokens, *grid)
    seen = sum(kept[schedule.stage_of_layer(layer)] for layer in range(schedule.num_layers))
    return Fraction(seen, schedule.num_layers)


def every(tokens: int, layers: int, boundaries: int, keep, mixed: bool, first: int, last: int):
    """All schedules there are, with their averages, by brute force."""
    orders = product(keep, repeat=boundaries) if mixed else ([k] * boundaries for k in keep)
    for order in orders:
        for places in combinations(range(first, last + 1), boundaries):
            text = ",".join(f"{place}:{k}" for place, k in zip(places, order, strict=True))
            schedule = CompressionSchedule.parse(text, layers)
            kept = schedule.kept(tokens)
            if len(set(kept)) == len(kept):  # each boundary drops something
                yield schedule, average(schedule, tokens), kept


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_finds_all_that_brute_force_finds(data) -> None:
    layers = data.draw(st.integers(2, 9))
    tokens = data.draw(st.integers(4, 60))
    first = data.draw(st.integers(0, layers - 1))
    last = data.draw(st.integers(first, layers - 1))
    boundaries = data.draw(st.integers(1, min(3, last - first + 1)))
    shares = ["1/2", "1/3", "1/4", "2/3", "0.9"]
    keep = data.draw(st.lists(st.sampled_from(shares), min_size=1, max_size=3, unique=True))
    mixed, block = data.draw(st.booleans()), data.draw(st.sampled_from([1, 1, 2, 4]))
    there = [
        (schedule, mean)
        for schedule, mean, kept in every(tokens, layers, boundaries, keep, mixed, first, last)
        if all((tokens - count) % block == 0 for count in kept)
    ]
    asked = data.draw(st.fractions(Fraction(1, 3), tokens, max_denominator=7))
    options = {"keep": keep, "mixed": mixed, "first_layer": first, "last_layer": last}
    arguments = (asked, tokens, layers, boundaries)
    if not there:
        with pytest.raises(ValueError, match=r"none of .* does so"):
            search(*arguments, **options, block_size=block)
        return
    means = [mean for _, mean in there]
    off = min(abs(mean - asked) for mean in means)
    best = {schedule: mean for schedule, mean in there if abs(mean - asked) == off}
    if not min(means) <= asked <= max(means):
        with pytest.raises(ValueError, match="can't be met by") as error:
            search(*arguments, **options, block_size=block)
        assert str(error.value).split(", by ")[-1] in map(str, best)
        return
    found = search(*arguments, **options, block_size=block)
    assert len(found.schedules) == len(best)
    assert dict(zip(found.schedules, found.averages, strict=True)) == best
    assert found.exact == (off == 0)

    def rank(schedule: CompressionSchedule):
        places = [b.layer for b in schedule.boundaries]
        edges = [0, *places, layers]
        uneven = sum((b - a) ** 2 for a, b in pairwise(edges))
        order = [[Fraction(k) for k in keep].index(b.keep) for b in schedule.boundaries]
        return best[schedule] > asked, uneven, [-place for place in places], order

    assert list(found.schedules) == sorted(best, key=rank)
    with_exact = {**options, "block_size": block, "exact": True}
    if off:
        with pytest.raises(ValueError, match="can't be met by"):
            search(*arguments, **with_exact)
    else:
        assert search(*arguments, **with_exact) == found
    assert for_budget(*arguments, **options, block_size=block) == found.schedules[0]


def test_the_design_example() -> None:
    schedule = for_budget(average_tokens=192, vision_tokens=576, num_layers=32, num_boundaries=2)
    assert str(schedule) == "5:1/3,17:1/3"
    assert average(schedule, 576) == 192
    found = search(192, 576, 32, 2)
    assert found.exact
    # Every a, b with 3a + b = 32.
    assert {tuple(b.layer for b in s.boundaries) for s in found.schedules} == {
        (a, 32 - 3 * a) for a in range(1, 8)
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    schedule = CompressionSchedule.preset(name)
    model, tokens = name.split("/")
    assert schedule.num_layers == ModelShape.preset(model).num_layers
    assert average(schedule, 576) == int(tokens)
    counted = account(ModelShape.preset(model), schedule, text_tokens=1)
    assert counted.average_processed == int(tokens)
    assert all((576 - count) % 16 == 0 for count in schedule.kept(576))
    options = {"num_boundaries": 2}
    if tokens == "64":
        with pytest.raises(ValueError, match="can't be met"):
            for_budget(64, 576, schedule.num_layers, first_layer=2, **options)
        options = {"num_boundaries": 3, "mixed": True}
    arguments = (int(tokens), 576, schedule.num_layers)
    assert schedule == for_budget(*arguments, first_layer=2, exact=True, **options)


def test_known_nearest() -> None:
    assert str(for_budget(191.25, 576, 32, 3, keep="1/4", exact=True)) == "8:1/4,16:1/4,24:1/4"
    halves = search(192, 576, 32, 3, keep="1/2")
    assert set(halves.averages) == {Fraction("191.25")}
    for text in ("4:1/2,8:1/2,21:1/2", "5:1/2,9:1/2,15:1/2"):
        assert CompressionSchedule.parse(text, 32) in halves.schedules


def test_as_near_below_as_above() -> None:
    found = search(301.5, 576, 32, 1, keep="1/2")  # one layer is 9 tokens
    assert [str(s) for s in found.schedules] == ["1:1/2", "2:1/2"]
    assert found.averages == (297, 306)
    assert not found.exact


def test_grid() -> None:
    options = {"pattern": "grid", "grid": (24, 24), "positions": "renumber"}
    found = search(192, 576, 32, 2, mixed=True, **options)
    assert found.exact
    for schedule in found.schedules:
        assert average(schedule, 576, 24, 24) == 192
        assert str(schedule).endswith("@grid@renumber")
    assert str(for_budget(144, 576, 8, 1, keep="1/2x1/3", **options, first_layer=0)) == (
        "1:1/2x1/3@grid@renumber"
    )


def test_large_searches_are_quick() -> None:
    """Seconds would mean that combinations are tried; it takes some 0.05 and 0.2 seconds."""
    import time

    started = time.perf_counter()
    assert search(192, 576, 40, 3, mixed=True).exact
    assert search(1000, 2880, 80, 3, mixed=True).exact
    assert time.perf_counter() - started < 5  # a busy machine's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"average_tokens": 577},
            "average_tokens: expected .* at most vision_tokens = 576, got 577",
        ),
        ({"average_tokens": 0}, "average_tokens: expected above 0"),
        ({"average_tokens": -3}, "average_tokens: expected above 0"),
        ({"average_tokens": float("nan")}, "average_tokens: expected a finite number"),
        ({"average_tokens": 576}, "nearest is 553.5, by 30:1/2,31:1/2"),
        ({"average_tokens": 20}, "56.25 to 553.5; the nearest is 56.25, by 1:1/4,2:1/4"),
        ({"average_tokens": 191, "exact": True}, "the nearest is 191"),
        ({"vision_tokens": 0}, "vision_tokens: expected at least 1, got 0"),
        ({"num_layers": 0}, "num_layers: expected at least 1"),
        ({"num_boundaries": 0}, "num_boundaries: expected at least 1"),
        ({"num_boundaries": 32}, "num_boundaries: expected at most 31"),
        ({"first_layer": -1}, "first_layer: expected at least 0"),
        ({"first_layer": 9, "last_layer": 8}, "first <= last"),
        ({"last_layer": 32}, "last < num_layers = 32, got 1 and 32"),
        ({"block_size": 0}, "block_size: expected at least 1"),
        ({"block_size": 1000}, "keep, block_size: expected shares that drop"),
        ({"keep": 1}, "keep: expected shares above 0 and below 1, got 1"),
        ({"keep": ["1/2", 0]}, "keep: expected shares above 0 and below 1, got 0"),
        ({"keep": "3/2"}, "keep: .* expected a keep share in"),
        ({"keep": "half"}, "keep: .*expected a keep share such as"),
        ({"keep": []}, "keep: expected at least one share, got none"),
        ({"keep": "1/2x1/2"}, "keep: .*pattern 'grid' takes rows x columns"),
        ({"pattern": "grid"}, "height, width: pattern 'grid' needs both"),
        ({"pattern": "stride"}, "pattern: expected one of"),
        ({"positions": "mine"}, "positions: expected one of"),
        (
            {"num_boundaries": 6, "mixed": True, "keep": ["0.6", "0.7", "0.8"]},
            "at most 20000 schedules",
        ),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"average_tokens": 192, "vision_tokens": 576, "num_layers": 32, "num_boundaries": 2}
    with pytest.raises(ValueError, match=message):
        for_budget(**{**good, **change})


@pytest.mark.parametrize(
    "change", [{"average_tokens": "192"}, {"average_tokens": True}, {"num_layers": 32.0}]
)
def test_bad_types(change: dict) -> None:
    good = {"average_tokens": 192, "vision_tokens": 576, "num_layers": 32, "num_boundaries": 2}
    with pytest.raises(TypeError, match=next(iter(change))):
        for_budget(**{**good, **change})


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of 'llava-1.5-7b/192', .*'192'"):
        CompressionSchedule.preset("192")


def test_keep_default() -> None:
    assert search(192, 576, 32, 2) == search(192, 576, 32, 2, keep=KEEP)
    assert search(192, 576, 32, 2, keep=1 / 4) == search(192, 576, 32, 2, keep=Fraction(1, 4))
