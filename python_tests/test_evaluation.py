"""adsc eval: intervals, a file of results to go on from, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_case import STRONG, write_data

from adsc_kernels.cli import main
from adsc_kernels.evaluation import run as evaluation
from adsc_kernels.evaluation.intervals import bootstrap, wilson
from adsc_kernels.evaluation.results import Results


def test_wilson_is_its_formula() -> None:
    """Against values from the literature: 0 of 10, 8 of 10, 50 of 100."""
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_draws_whole_pictures() -> None:
    """Answers that agree within a picture say less than as many that don't."""
    right = [n < 50 for n in range(100)]
    together = bootstrap(right, [n // 10 for n in range(100)])
    apart = bootstrap(right, list(range(100)))
    assert together[1] - together[0] > 2 * (apart[1] - apart[0])
    assert together[0] < 0.5 < together[1]
    assert apart == pytest.approx(wilson(50, 100), abs=0.02)  # of independent questions
    assert bootstrap(right, list(range(100))) == apart  # the same draws each time


def test_what_is_retained_is_a_ratio_over_the_same_pictures() -> None:
    right = [True, True, False, True] * 25
    assert bootstrap(right, list(range(100)), right) == (1.0, 1.0)
    low, high = bootstrap(right, list(range(100)), [True] * 100)
    assert low < 0.75 < high


def test_results_are_of_one_set_of_questions(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    results = Results(file, {"data": "a"})
    key = {"method": "adsc", "schedule": "", "budget": None, "seed": 0, "adapter": None}
    results.entry(**key)["right"] = "101"
    results.save()
    again = Results(file, {"data": "a"})
    assert again.entry(**key)["right"] == "101"
    assert again.entry(**{**key, "seed": 1})["right"] == ""
    with pytest.raises(ValueError, match="expected results about"):
        Results(file, {"data": "b"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def command(data: Path, out: Path, *more: str) -> list[str]:
    given = ["eval", "--data", str(data), "--out", str(out), "--device", "cpu", "--batch", "3"]
    return [*given, "--json", *more]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--method", "adsc", "uniform", "--schedule", STRONG, "--budget", "16"]
    assert main(command(data, tmp_path / "whole.json", *asked)) == 0
    whole = json.loads(capsys.readouterr().out)
    # The grid of budget 16 is the schedule's; one goes through the other's decoder.
    assert [row["average"] for row in whole] == [16.0, 16.0]
    assert whole[0]["accuracy"] == whole[1]["accuracy"] < 1
    assert whole[0]["questions"] == 8
    assert sum(whole[0]["by_kind"].values()) > 0

    counted: list[int] = []
    plain = evaluation.encode

    def stop_at_the_third(*args: Any, **kwargs: Any) -> Any:
        counted.append(len(args[1]))
        if len(counted) == 3:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(evaluation, "SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "encode", stop_at_the_third)
        assert main(command(data, tmp_path / "parts.json", *asked)) == 130
    part = json.loads((tmp_path / "parts.json").read_text())
    assert len(part["runs"][0]["right"]) == 6
    capsys.readouterr()
    counted.clear()
    monkeypatch.setattr(
        evaluation, "encode", lambda *a, **k: (counted.append(len(a[1])), plain(*a, **k))[1]
    )
    assert main(command(data, tmp_path / "parts.json", *asked)) == 0
    assert counted == [2, 3, 3, 2]
    got = json.loads(capsys.readouterr().out)
    assert [(r["accuracy"], r["by_kind"]) for r in got] == [
        (r["accuracy"], r["by_kind"]) for r in whole
    ]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method", "fastw", "--budget", "3"], "method: expected one of"),
        (["--method", "fastv"], "--budget: expected with --method fastv"),
        (["--method", "adsc"], "--schedule: expected with --method adsc"),
        (["--method", "fastv", "--budget", "36"], "fastv: expected a budget above 36"),
        (["--schedule", "4:1/4@nowhere"], "expected one of"),
        (["--adapter", "no-such-folder"], "no such file"),
    ],
)
def test_bad_input_is_said_in_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert main(command(data, tmp_path / "out.json", *more)) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
