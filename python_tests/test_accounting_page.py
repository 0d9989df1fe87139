"""docs/accounting.md says what its script computes, and its Python runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "accounting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("page", ROOT / "tools" / "accounting_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_script_writes(script) -> None:
    """After a change on purpose: python tools/accounting_page.py"""
    for said, computed in zip(PAGE.splitlines(), script.page().splitlines(), strict=False):
        assert said == computed
    assert script.page() == PAGE


def test_its_python_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    session: dict = {}
    exec(compile(block, "accounting.md", "exec"), session)
    assert session["costs"].average_processed == 192


def test_its_pictures_are_there() -> None:
    for name in re.findall(r"!\[.*?\]\((.*?)\)", PAGE):
        with Image.open(ROOT / "docs" / name) as picture:
            picture.verify()


def test_the_numbers_that_matter(script) -> None:
    """To four digits, and by hand where a formula is short."""
    assert script.kv_cut() == pytest.approx(100 * (1 - 293 / 677))
    assert round(script.kv_cut(), 2) == 56.72
    assert round(script.macs_cut("linear-3"), 2) == 56.72  # all that is linear follows the cache
    by_name = {
        "exact": 54.47,
        "decoder": 56.96,
        "profiler": 55.12,
        "everything": 54.87,
        "full-3": 57.20,
        "halved-3": 56.96,
        "full-2": 57.33,
        "halved-2": 57.03,
        "linear-2": 56.72,
        "full-3+tower": 54.73,
        "halved-3+tower": 54.47,
        "linear-3+tower": 54.40,
        "full-2+tower": 54.21,
        "halved-2+tower": 53.88,
        "linear-2+tower": 53.77,
        "vision-only": 66.96,
    }
    assert {name: round(script.macs_cut(name), 2) for name in by_name} == by_name
    # The two ways to the paper's pair.
    assert round(script.macs_cut("linear-2+tower", script.QUARTERS, 103), 2) == 53.73
    assert round(script.kv_cut(script.QUARTERS, 103), 2) == 56.66
    assert round(script.macs_cut("linear-3+tower", decode=9), 2) == 53.72
    assert round(script.macs_cut("exact", decode=10), 2) == 53.71
    # n, d, m and 32 layers of 4nd^2 + 2n^2d + 3ndm, vision tokens alone.
    d, m = 4096, 11008
    layer = [4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in (576, 288, 144, 72)]
    pyramid = script.CompressionSchedule.parse("8:1/2,16:1/2,24:1/2", 32)
    dense, kept = (
        script.counted(one, convention="vision-only").macs for one in (script.DENSE, pyramid)
    )
    assert dense == 32 * layer[0] == pytest.approx(3.817e12, rel=1e-4)
    assert kept == 8 * sum(layer) == pytest.approx(1.777e12, rel=3e-4)
    assert (f"{dense / 1e12:.2f}", f"{kept / 1e12:.2f}") == ("3.82", "1.78")


def test_no_decoder_only_prefill_cuts_less_than_the_cache(script) -> None:
    for name in ("decoder", "full-3", "halved-3", "linear-3", "full-2", "halved-2", "linear-2"):
        for schedule in (*script.FOUND.schedules, script.QUARTERS):
            for text in (0, 40, 101, 300):
                assert script.macs_cut(name, schedule, text) >= script.kv_cut(schedule, text) - 1e-9
