"""The pages' tables and plots about whole prompts and answers are what `adsc bench e2e` wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import reach_e2e  # noqa: E402
import table  # noqa: E402
import table_e2e  # noqa: E402

STAMP = {
    "date": "2026-12-01 10:00 UTC", "dry_run": False, "device": "NVIDIA H200", "driver": "580.1",
    "commit": "0123456789abcdef", "changed_files": 0, "torch": "2.11.0", "triton": "3.6.0",
    "nvcc": "13.0",
}  # fmt: skip
MACS = {"dense": 1000, "192": 430, "transformers": 1000, "fastv": 440}


def row(way: str, ttft: float, batch: int = 8, step: float = 10.0, **other: Any) -> dict[str, Any]:
    prompt = {"gemm": 0.8 * ttft, "attention": 0.1 * ttft, "boundary": 0.01 * ttft, "copy": 0.5}
    on_device = {"ms": 0.91 * ttft + 0.5, "by_kind": prompt, "launches": 300.0}
    return {
        "batch": batch, "vision_tokens": 576, "text_tokens": 101, "new_tokens": 32, "way": way,
        "average_tokens": 192.0, "prefill_macs": MACS[way] * batch, "ttft_ms": ttft,
        "ms_per_token": None if way == "fastv" else step, "tokens_per_second": 50.0,
        "cache_bytes": None if way == "fastv" else 3 << 30, "peak_bytes": 5 << 30,
        "prefill": on_device, "share_outside": 0.1, "step": {
            "ms": 8.0, "by_kind": {"attention": 2.0}, "launches": 3.0,
        }, **other,
    }  # fmt: skip


def largest(way: str, batch: int, speed: float) -> dict[str, Any]:
    return {
        "batch": batch, "vision_tokens": 576, "new_tokens": 32, "way": way, "ms_per_token": 9.0,
        "memory_bytes": 70 << 30, "decode_tokens_per_second": speed, "cache_bytes": 57 << 30,
        "peak_bytes": None,
    }  # fmt: skip


def report(*rows: dict[str, Any], **stamp: Any) -> dict[str, Any]:
    return {
        "target": "gpu-e2e", "stamp": {**STAMP, **stamp}, "model": "llava-1.5-7b",
        "dtype": "torch.bfloat16", "runs": 5, "rows": list(rows), "left_out": [],
    }  # fmt: skip


def results(folder: Path, **reports: dict[str, Any]) -> table.Results:
    for name, one in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(one))
    return table.read_results(folder)


ROWS = [row("dense", 100.0), row("192", 40.0, step=7.5), row("transformers", 90.0)]
ROWS += [row("fastv", 50.0), row("dense", 20.0, batch=1), row("192", 10.0, batch=1, step=8.5)]


def test_tables(tmp_path: Path) -> None:
    found = results(tmp_path, a=report(*ROWS, largest("dense", 100, 900.0)))
    text = table_e2e.all_rows(found)
    assert "| vision tokens | batch | dense | 192 | FastV | transformers |" in text
    assert "| 576 | 1 | 20.0 | 10.0 (2.00 ×) | – | – |" in text
    assert "| 576 | 8 | 100.0 | 40.0 (2.50 ×) | 50.0 (2.00 ×) | 90.0 (1.11 ×) |" in text
    # The copies count as other.
    assert (
        "| 576 | 8 | dense | 80.00 | 10.00 | 0.00 | 0.00 | 1.00 | 0.50 | 91.50 | 100.00 |" in text
    )
    assert "| 576 | 8 | 32 | 192 | 7.50 | 8.00 | 2.00 | 3 | 50 | 3.00 | 5.0 |" in text
    assert "| 576 | 8 | FastV |" in text and "| 32 | FastV |" not in text  # it has no decode
    assert "| 576 | 70 | dense | 100 | 9.00 | 900 | 57.0 | – |" in text
    page = table_e2e.headline(found)
    assert "NVIDIA H200" in page and "FastV" not in page and "(2.50 ×)" in page


def test_reports_of_one_commit_count_together(tmp_path: Path) -> None:
    """By the later one where both have a row; those of another commit not at all."""
    early = report(row("dense", 100.0), row("192", 50.0))
    late = report(row("192", 25.0), date="2026-12-01 11:00 UTC")
    old = report(row("fastv", 1.0), date="2026-11-01 11:00 UTC", commit="fedcba")
    text = table_e2e.all_rows(results(tmp_path, a=late, b=early, c=old))
    assert "| 576 | 8 | 100.0 | 25.0 (4.00 ×) |" in text and "FastV" not in text


def test_models_stand_apart(tmp_path: Path) -> None:
    other = {**report(row("dense", 3.0)), "model": "qwen2.5-vl-7b"}
    found = results(tmp_path, a=other, b=report(row("dense", 100.0), row("192", 50.0)))
    text = table_e2e.all_rows(found)
    first, second = text.split("**qwen2.5-vl-7b**")
    assert "**llava-1.5-7b**" in first and "| 576 | 8 | 3.0 |" in second
    assert "| 100.0 |" in table_e2e.headline(found) and "| 3.0 |" not in table_e2e.headline(found)


def test_aims() -> None:
    rows = [*ROWS, largest("dense", 100, 900.0), largest("192", 230, 1700.0)]
    found = {aim.what: (aim.got, aim.met) for aim in reach_e2e.aims(rows)}
    one, eight = "batch 1, 576 tokens: ", "batch 8, 576 tokens: "
    assert found[one + "192, times as fast as dense"] == ("2.00 ×", True)
    promised = "192, of the 2.33 × that MACs promise"
    assert found[eight + promised] == ("107.50 %", True)
    assert found[eight + "dense, times as fast as transformers"] == ("0.90 ×", False)
    assert found[eight + "192, times as fast as FastV"] == ("1.25 ×", True)
    assert found[eight + "192, device time outside GEMM and attention"] == ("10.0 %", False)
    assert found[eight + "192, boundaries"][1] is False
    assert found[eight + "192, a step's wall over device time"] == ("0.94 ×", True)
    assert found[eight + "dense, a step's wall over device time"] == ("1.25 ×", False)
    assert found[eight + "dense, launches a step"] == ("3", True)
    assert found["576 tokens: 192, times the largest batch"] == ("2.30 ×", True)
    assert found["576 tokens: 192, times the tokens/s at the largest batch"] == ("1.89 ×", False)


def test_plots() -> None:
    """A point for each way but dense, on the promise's line if MACs are all that costs time."""
    pytest.importorskip("matplotlib")
    import plot_e2e

    page = plot_e2e.figure(report(*ROWS))
    left, right = page.axes
    points = {
        (round(float(line.get_xdata()[0]), 1), round(float(line.get_ydata()[0]), 2))
        for line in left.lines
        if len(line.get_xdata()) == 1
    }
    assert points == {(57.0, 2.0), (57.0, 2.5), (56.0, 2.0)}
    labels = [label.get_text() for label in right.get_xticklabels()]
    assert labels == ["dense\nbatch 1", "192", "dense\nbatch 8", "192"]
