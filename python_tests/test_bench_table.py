"""The performance tables of the pages are what bench/results says, and made of nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import table  # noqa: E402

README = (
    "a\n<!-- gpu-results -->\nold\n<!-- /gpu-results -->\nb\n"
    "<!-- cpu-results -->\nold\n<!-- /cpu-results -->\nc\n"
)
STAMP = {
    "date": "2026-12-01 10:00 UTC", "dry_run": False, "device": "NVIDIA H200", "driver": "580.1",
    "commit": "0123456789abcdef", "changed_files": 0, "torch": "2.11.0", "triton": "3.6.0",
    "nvcc": "13.0",
}  # fmt: skip
CASE = {
    "op": "downsample",
    "case": "batch 32, hidden 4096",
    "bytes_moved": 1 << 25,
    "times": {
        "cuda": {"graph_us": 10.0, "eager_us": 20.0},
        "triton": {"graph_us": 11.0, "eager_us": 40.0},
        "eager": {"graph_us": 25.0, "eager_us": 30.0},
        "eager compiled": {"error": "RuntimeError: no"},
        "copy": {"graph_us": 9.0, "eager_us": 8.0},
    },
    "gb_per_s": {"cuda": 3355.4},
    "share_of_copy": {"cuda": 0.8},
}
BENCH: dict[str, Any] = {
    "target": "gpu-bench",
    "ok": True,
    "stamp": STAMP,
    "jobs": [
        {
            "name": "downsample",
            "ok": True,
            "ceilings": {"copy_gb_per_s": 4300.0, "empty_kernel_graph_us": 1.2},
            "cases": [CASE],
            "left_out": [],
        }
    ],
}


def written(folder: Path, **reports: dict[str, Any]) -> Path:
    for name, report in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(report))
    return folder


def readme_of(folder: Path) -> str:
    return table.filled(README, table.PAGES["README.md"], table.read_results(folder))


def gpu_page_of(folder: Path) -> str:
    sections = table.PAGES["docs/performance.md"]
    page = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in sections)
    return table.filled(page, sections, table.read_results(folder))


def test_the_pages_are_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, "bench/table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_results(tmp_path: Path) -> None:
    text = readme_of(tmp_path)
    assert "old" not in text
    assert "**GPU**: unrun." in text and "`make gpu-all`" in text
    assert text.startswith("a\n<!-- gpu-results -->\n**GPU**") and text.endswith("-->\nc\n")
    page = gpu_page_of(tmp_path)
    assert "old" not in page and page.lower().count("unrun") == 4


def test_gpu_results(tmp_path: Path) -> None:
    old = copy.deepcopy(BENCH)
    old["stamp"].update(date="2026-11-30 10:00 UTC", device="another", commit="fedcba")
    failure = {"test": "python_tests.gpu.test_parity::test_downsample", "message": "no"}
    tests = {
        "target": "gpu-test",
        "stamp": STAMP,
        "jobs": [
            {
                "name": "parity, cuda",
                "passed": 7,
                "failed": 1,
                "skipped": {"why": 2},
                "failures": [failure],
            },
            {"name": "traps, cuda", "error": "stopped: out of time"},
        ],
    }
    tools = {
        "target": "gpu-sanitize",
        "stamp": STAMP,
        "jobs": [{"name": "memcheck, cuda", "summary": "ERROR SUMMARY: 0 errors"}],
    }
    folder = written(tmp_path, a=BENCH, b=old, c=tests, d=tools)
    text = gpu_page_of(folder)
    assert "another" not in text
    row = "| 32.00 | 10.0 | 3355 | 0.80 | 1.10 | 2.50 | – | 20.0 | 1.50 |"
    assert f"| `downsample` | batch 32, hidden 4096 {row}" in text
    assert "NVIDIA H200, driver 580.1, torch 2.11.0" in text and "commit 0123456789" in text
    assert "A copy of 1 GiB in a graph moves 4300 GB/s, an empty kernel takes 1.20 µs" in text
    assert "7 passed, 1 failed, 2 skipped; not ended in time: traps" in text
    assert "- failed: `test_parity::test_downsample`" in text
    assert "memcheck, cuda: ERROR SUMMARY: 0 errors" in text


def test_the_readme_has_the_headline(tmp_path: Path) -> None:
    more = copy.deepcopy(BENCH)
    more["jobs"][0]["cases"].append({**CASE, "case": "another size"})
    text = readme_of(written(tmp_path, a=more))
    assert "unrun" in text.partition("cpu-results")[0]  # of kernels that changed since
    assert "| `downsample` | batch 32, hidden 4096 | 32.00 | 10.0 | 0.80 | 1.10 |" in text
    assert "another size" not in text and "another size" in gpu_page_of(tmp_path)


def test_where_something_else_is_faster(tmp_path: Path) -> None:
    assert "of so many cases. Nowhere." in readme_of(written(tmp_path, a=BENCH))
    slower = copy.deepcopy(BENCH)
    slower["jobs"][0]["cases"][0]["times"]["eager"] = {"graph_us": 9.9, "eager_us": 20.1}
    text = readme_of(written(tmp_path, a=slower))
    assert "of so many cases. PyTorch in a graph: `downsample` 1 of 1." in text


def test_the_ceiling_is_the_fastest_copy(tmp_path: Path) -> None:
    faster = copy.deepcopy(BENCH)
    faster["jobs"][0]["cases"][0]["times"]["copy kernel"] = {"graph_us": 7.0, "eager_us": 30.0}
    assert "| 3355 | 0.70 |" in gpu_page_of(written(tmp_path, a=faster))


def test_reports_of_one_commit_stand_together(tmp_path: Path) -> None:
    """In a folder of their own, with what else was measured beside them."""
    folder = tmp_path / "h200-0123456789"
    folder.mkdir()
    for date, backend in (("2026-12-01 10:00 UTC", "cuda"), ("2026-12-01 11:00 UTC", "triton")):
        jobs = [{"name": f"parity, {backend}", "passed": 3}]
        stamp = {**STAMP, "date": date}
        written(
            folder, **{f"gpu-test-{backend}": {"target": "gpu-test", "stamp": stamp, "jobs": jobs}}
        )
    written(folder, **{"gpu-bench": BENCH})
    (folder / "decode_profile.txt").write_text(
        "1 576 '' wall [3.0, 2.0] GPU ms 1.50 kernels 20\n  a line of a kernel\n"
    )
    text = gpu_page_of(tmp_path)
    assert text.count("3 passed, 0 failed") == 2
    assert "| 1 | 576 | dense | 1.50 | 2 to 3 | 20 |" in text


def test_what_failed_is_said(tmp_path: Path) -> None:
    broken = copy.deepcopy(BENCH)
    job = broken["jobs"][0]
    job["ok"], job["left_out"] = False, ["boundary_step batch 1"]
    job["cases"][0]["times"]["cuda"] = {"error": "CUDA error"}
    text = gpu_page_of(written(tmp_path, a=broken))
    assert "| `downsample` | batch 32, hidden 4096 | failed |" in text
    assert "Left out for time: boundary_step batch 1." in text
    assert "downsample batch 32, hidden 4096 (cuda)" in text


def test_a_dry_run_is_refused(tmp_path: Path) -> None:
    dry = copy.deepcopy(BENCH)
    dry["stamp"]["dry_run"] = True
    with pytest.raises(ValueError, match=r"a\.json: .*dry run"):
        table.read_results(written(tmp_path, a=dry))


def test_markers_must_be_there() -> None:
    with pytest.raises(ValueError, match="one pair of markers <!-- gpu-results -->"):
        table.filled("no markers", table.PAGES["README.md"], {})


def test_every_line_of_a_table_has_as_many_cells(tmp_path: Path) -> None:
    failed = copy.deepcopy(BENCH)
    failed["jobs"][0]["cases"].append({**CASE, "times": {"cuda": {"error": "no"}}})
    text = gpu_page_of(written(tmp_path, a=failed))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


def test_the_plot_has_every_op_and_the_copy_beside_it() -> None:
    pytest.importorskip("matplotlib")
    import plot

    page = plot.figure(table.read_results(table.RESULTS)["gpu-bench"][-1])
    panels = {axes.get_title(): axes for axes in page.axes}
    for op in plot.PANELS:
        lines = {line.get_label(): line.get_ydata() for line in panels[op].get_lines()}
        assert {"the fastest copy", "CUDA", "Triton"} < lines.keys()
        assert all(len(points) >= 3 for points in (lines["CUDA"], lines["the fastest copy"]))
    assert (ROOT / "docs" / "gpu.png").stat().st_size < 200_000
