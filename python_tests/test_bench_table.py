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
import reach  # noqa: E402
import table  # noqa: E402
import table_gpu  # noqa: E402

README = (
    "a\n<!-- gpu-results -->\nold\n<!-- /gpu-results -->\nb\n"
    "<!-- e2e-results -->\nold\n<!-- /e2e-results -->\n"
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


def test_a_case_measured_again_counts_as_it_was_then(tmp_path: Path) -> None:
    twice = copy.deepcopy(BENCH)
    times = {**CASE["times"], "cuda": {"graph_us": 8.0, "eager_us": 20.0}}
    again = {"name": "downsample, rest", "cases": [{**CASE, "times": times}], "left_out": ["more"]}
    twice["jobs"].append(again)
    text = gpu_page_of(written(tmp_path, a=twice))
    assert text.count("| `downsample` | batch 32, hidden 4096 |") == 1
    assert "| 32.00 | 8.0 |" in text and "Left out for time: more." in text


def bounds_of(op: str, case: str, **times: tuple[float, float]) -> dict[str, float]:
    """By how much each bound is missed; times: in a graph and of the host."""
    names = {name.replace("_", " "): t for name, t in times.items()}
    found = {
        name: {"graph_us": t[0], "eager_us": 99.0, "host_us": t[1]} for name, t in names.items()
    }
    of = {"op": op, "case": case, "bytes_moved": 1 << 28, "times": found}
    return {bound.what: round(bound.over, 3) for bound in reach.bounds([of])}


def test_bounds_are_held_against_what_was_measured() -> None:
    rivals = {"eager": (12.0, 4.0), "triton": (8.0, 12.5), "copy_kernel": (9.6, 1.0)}
    given = {"cuda_by_int32_rows": (11.0, 1.0), "gather_kernel": (10.0, 1.0)}
    found = bounds_of("downsample", "batch 32, hidden 4096", cuda=(10.3, 5.0), **rivals, **given)
    assert found == {
        "at most 1.03 × a gather of given rows": 0.0,
        "at most index_select": round(10.3 / 12 - 1, 3),
        "at most Triton": round(10.3 / 8 - 1, 3),
        "at least 0.96 of the copy": 0.03,
        "host: at most index_select": 0.25,
        "host: Triton at most 2.5 × CUDA": 0.0,
    }
    one = bounds_of("boundary_step", "batch 1, hidden 4096", cuda=(11.6, 50.0), copy=(10.0, 1.0))
    assert one == {"at most 1.16 × the copy": 0.0, "host: at most 25 µs": 1.0}
    caches = bounds_of("compact_kv_", "7B, batch 1, NHD", cuda=(20.0, 60.0), copy=(9.0, 1.0))
    assert caches == {"at least 0.9 of the copy": 1.0, "host: at most 60 µs": 0.0}
    layout = bounds_of("rebuild_metadata", "8192 sequences", cuda=(18.0, 1.0))
    assert layout == {"at most 12.0 µs": 0.5}


def test_a_step_is_held_to_its_two_ops() -> None:
    cases = [
        {"op": op, "case": "8", "bytes_moved": 1, "times": {"cuda": {"graph_us": t, "host_us": t}}}
        for op, t in (("compress_step", 12.0), ("boundary_step, then compact_kv_", 10.0))
    ]
    for case in cases:
        case["times"]["copy"] = {"graph_us": 1.0}
    text = reach.summary(cases)
    assert text.count("8: 12.0 µs, 20 % over") == 2  # on the device and on the host
    assert "| `compress_step` | host: at most its two ops | 0 of 1 |" in text


def test_reports_of_one_commit_stand_together(tmp_path: Path) -> None:
    """In a folder of their own."""
    folder = tmp_path / "h200-0123456789"
    folder.mkdir()
    for date, backend in (("2026-12-01 10:00 UTC", "cuda"), ("2026-12-01 11:00 UTC", "triton")):
        jobs = [{"name": f"parity, {backend}", "passed": 3}]
        stamp = {**STAMP, "date": date}
        written(
            folder, **{f"gpu-test-{backend}": {"target": "gpu-test", "stamp": stamp, "jobs": jobs}}
        )
    written(folder, **{"gpu-bench": BENCH})
    newer = copy.deepcopy(BENCH)
    newer["stamp"].update(date="2026-12-02 10:00 UTC", commit="fedcba", device="another")
    written(tmp_path, **{"gpu-bench": newer})
    text = gpu_page_of(tmp_path)
    assert text.count("3 passed, 0 failed") == 2
    assert "another, driver" in text


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
    broken = {**CASE, "case": "another size", "times": {"cuda": {"error": "no"}}}
    failed["jobs"][0]["cases"].append(broken)
    text = table_gpu.all_cases(table.read_results(written(tmp_path, a=failed)))
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
