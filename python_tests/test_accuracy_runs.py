"""examples/digits/accuracy.py: jobs that may run side by side, and what they add up to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from digits_example import example
from training_case import write_data

from adsc_kernels.schedule import CompressionSchedule
from adsc_kernels.training.config import TrainConfig
from adsc_kernels.training.curriculum import Curriculum, average


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    with example("accuracy") as module:
        yield module


@pytest.fixture
def work(accuracy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    data = write_data(tmp_path / "data")
    monkeypatch.setattr(accuracy, "data", lambda folder: (data, data))
    return accuracy.Work(tmp_path, None, "cpu")


def test_jobs_that_run_side_by_side_share_no_file(work: Any) -> None:
    jobs = list(work.jobs())
    assert len({name for name, _ in jobs}) == len(jobs)
    outs = [{c[c.index("--out") + 1] for c in commands if "--out" in c} for _, commands in jobs]
    assert all(len(files) == 1 for files in outs)
    assert len(set().union(*outs)) == len(jobs)


def test_every_run_is_one_that_can_be_trained(work: Any) -> None:
    trained = [c for _, commands in work.jobs() for c in commands if "train" in c]
    assert len(trained) > 20
    for command in trained:
        config = TrainConfig.from_file(command[-1])
        budget = Path(command[-1]).stem.split("-")[0]
        schedule = CompressionSchedule.parse(config.schedule, 16)
        Curriculum(config.curriculum, schedule, config.steps)
        assert average(schedule) <= (576 if budget == "dense" else int(budget))


def test_a_failed_job_stops_no_other(
    work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    touch = f"open({str(tmp_path / 'there')!r}, 'w')"
    jobs = [("bad", [job("import sys; sys.exit('why')"), job("1/0")]), ("good", [job(touch)])]
    monkeypatch.setattr(work, "jobs", lambda: iter(jobs))
    with pytest.raises(SystemExit, match=r"failed, as .*logs says: bad$"):
        work.do_all(1)
    assert (tmp_path / "there").is_file()
    assert (tmp_path / "logs" / "bad.log").read_text() == "why\n"


def test_results_of_many_files_are_one(accuracy: ModuleType, work: Any, tmp_path: Path) -> None:
    def write(name: str, data: str, right: str, **key: Any) -> None:
        run = {"method": name, "schedule": None, "budget": 64, "seed": 0, "adapter": None, **key}
        run |= {"right": right, "seconds": {"cpu float32": 1.0}}
        text = json.dumps({"about": {"data": data}, "runs": [run]})
        (tmp_path / "results" / f"{name}.json").write_text(text)

    write("adsc", "a", "1" * 8, schedule="", budget=None)
    write("fastv", "a", "11110000")
    write("uniform", "a", "1111")  # not through
    rows = accuracy.export(work)["runs"]
    assert [(row["method"], row["accuracy"], row["retention"]) for row in rows] == [
        ("adsc", 1.0, 1.0),
        ("fastv", 0.5, 0.5),
    ]
    assert rows[1]["seconds"] == {"cpu float32": 1.0}
    write("uniform", "b", "1" * 8)
    with pytest.raises(SystemExit, match="expected results about"):
        accuracy.export(work)
