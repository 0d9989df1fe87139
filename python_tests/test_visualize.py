"""``adsc visualize``: what is drawn, counted and said, and what it refuses."""

import json
import re
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.plans import schedules
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adsc_kernels import CompressionSchedule
from adsc_kernels.cli import main
from adsc_kernels.coverage import Coverage, coverage, under_pattern
from adsc_kernels.picture import PANEL, centre_box
from adsc_kernels.schedule import PATTERNS

GRID = (24, 24)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def json_of(capsys, *arguments: str) -> dict[str, Any]:
    assert main(["visualize", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("pattern", ["start", "center"])
def test_a_stride_that_divides_the_width_deletes_whole_columns(stride: int, pattern: str) -> None:
    schedule = CompressionSchedule.parse(f"0:1/{stride}@{pattern}", 1)
    found = coverage(schedule, GRID)[1]
    first = 0 if pattern == "start" else stride // 2
    assert found.kept == {24 * row + c for row in range(24) for c in range(first, 24, stride)}
    assert (found.rows, found.columns) == (24, 24 // stride)
    assert found.deletes_columns(GRID)


def test_what_grid_does_instead() -> None:
    for stride, side in ((2, 17), (3, 14), (4, 12)):
        line = CompressionSchedule.parse(f"0:1/{stride}", 1)
        found = coverage(under_pattern(line, "grid", GRID), GRID)[1]
        assert (found.rows, found.columns, len(found.kept)) == (side, side, side**2)
        assert not found.deletes_columns(GRID)
        assert found.farthest == pytest.approx(sqrt(2))
    assert coverage(CompressionSchedule.parse("0:1/4", 1), GRID)[1].farthest == 3


@settings(deadline=None, max_examples=40)
@given(st.sets(st.integers(0, 34)), st.just((5, 7)))
def test_coverage_by_hand(kept: set[int], grid: tuple[int, int]) -> None:
    found = Coverage.of(frozenset(kept), grid)
    assert found.rows == sum(any(7 * row + c in kept for c in range(7)) for row in range(5))
    assert found.columns == sum(any(7 * row + c in kept for row in range(5)) for c in range(7))
    away = [
        min((sqrt((p // 7 - k // 7) ** 2 + (p % 7 - k % 7) ** 2) for k in kept), default=inf)
        for p in range(35)
    ]
    assert found.farthest == pytest.approx(max(away))


@settings(deadline=None, max_examples=60)
@given(schedules(), st.sampled_from(PATTERNS))
def test_another_pattern_keeps_about_as_many(schedule: CompressionSchedule, pattern: str) -> None:
    if schedule.pattern == "grid" and pattern != "grid":
        schedule = under_pattern(schedule, "start", GRID)
    other = under_pattern(schedule, pattern, GRID)
    assert other.pattern == pattern
    assert [b.layer for b in other.boundaries] == [b.layer for b in schedule.boundaries]
    if schedule.pattern != "grid":
        counts = zip(schedule.kept(576), other.kept(576, 24, 24), strict=True)
        if pattern != "grid":
            assert all(a == b for a, b in counts)
        else:  # a side is off by at most a half, and ceil adds less than one
            assert all(abs(sqrt(a) - sqrt(b)) <= 1 for a, b in counts)


def test_contact_sheet(capsys) -> None:
    assert main(["visualize"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^start +keep 1/4 +144 +24 of 24 +6 of 24 +3\.00$", out, re.MULTILINE)
    assert re.search(r"^grid +keep 1/4 +144 +12 of 24 +12 of 24 +1\.41$", out, re.MULTILINE)
    assert "Whole columns are deleted, and no row, under start keep 1/2; start keep 1/3;" in out
    assert out.splitlines()[-1] == "drawn in adsc-visualize.png"
    with Image.open("adsc-visualize.png") as picture:
        assert picture.width == 28 + 3 * (PANEL + 28)
        assert picture.height > 4 * PANEL


def test_survivors_by_stage_of_any_picture_and_grid(capsys, tmp_path: Path) -> None:
    """The bright patches of the drawn panel are those that the schedule keeps."""
    Image.new("RGB", (200, 90), (200, 30, 30)).save("red.png")
    options = ["--image", "red.png", "--grid", "4x6", "--out", "out.png"]
    facts = json_of(capsys, *options, "--schedule", "1:1/3@center", "--layers", "2")
    (first, second) = facts["panels"]
    assert first["tokens"] == 24
    assert second["kept"] == [3 * j + 1 for j in range(8)]
    assert (second["rows"], second["columns"], second["deletes_columns"]) == (4, 2, True)
    with Image.open("out.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # The whole picture comes first, since only its centre is seen; then a panel of 4 x 6 patches.
    side = PANEL // 6
    left, top = 28 + 240 + 28 + 6 * side + 28, 56 + 30
    bright = set()
    for patch in range(24):
        row, column = divmod(patch, 6)
        y, x = top + row * side + side // 2, left + column * side + side // 2
        if abs(pixels[y, x] - (200, 30, 30)).max() < 8:
            bright.add(patch)
    assert bright == set(second["kept"])
    stretched = json_of(capsys, *options, "--stretch", "--schedule", "1:1/3@center")
    assert stretched["panels"][1]["kept"] == second["kept"]


def test_stages_under_several_patterns(capsys) -> None:
    facts = json_of(capsys, "--schedule", "8:1/4,16:1/4", "--patterns", "start", "grid", "linspace")
    assert [panel["tokens"] for panel in facts["panels"]] == [576, 144, 36] * 3
    assert facts["panels"][4]["schedule"] == "8:1/2x1/2,16:1/2x1/2@grid"
    preset = json_of(capsys, "--schedule", "llava-1.5-7b/192")
    assert [panel["tokens"] for panel in preset["panels"]] == [576, 192, 64]
    grid = json_of(capsys, "--schedule", "8:1/2x1/3@grid")
    assert [panel["tokens"] for panel in grid["panels"]] == [576, 96]


def test_a_schedule_that_drops_all(capsys) -> None:
    facts = json_of(capsys, "--schedule", "8:0", "--patterns", "start", "grid")
    assert [panel["tokens"] for panel in facts["panels"]] == [576, 0, 576, 0]
    assert facts["panels"][1]["farthest"] is None
    assert main(["visualize", "--schedule", "8:0"]) == 0


@pytest.mark.parametrize(
    ("size", "grid", "box"),
    [
        ((48, 48), (24, 24), (0, 0, 48, 48)),
        ((100, 50), (24, 24), (25, 0, 75, 50)),
        ((50, 100), (10, 20), (0, 38, 50, 62)),
        ((100, 50), (10, 20), (0, 0, 100, 50)),
    ],
)
def test_centre_box(size, grid, box) -> None:
    assert centre_box(size, grid) == box


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--grid 576", "--grid: expected HEIGHTxWIDTH"),
        ("--grid 0x4", "--grid: expected HEIGHTxWIDTH of at least 1x1"),
        ("--grid 4xa", "expected a whole number"),
        ("--schedule 8", "at character 2 expected ':'"),
        ("--schedule 8:1/2 --layers 4", "boundary layer: expected 0 to 3"),
        ("--patterns stripes", "invalid choice: 'stripes'"),
        ("--image none.png", "no such file"),
        ("--out a.jpg", "--out: expected a name that ends in .png"),
    ],
)
def test_bad_input(arguments: str, message: str, capsys, tmp_path: Path) -> None:
    try:
        code = main(["visualize", *arguments.split()])
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
