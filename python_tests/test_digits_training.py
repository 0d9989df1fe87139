"""examples/digits/train.py: an interrupted training ends where an uninterrupted one does."""

import argparse
from pathlib import Path
from types import ModuleType

import pytest
import torch
from digits_example import example


@pytest.fixture(scope="module")
def train() -> ModuleType:
    with example("train") as module:
        yield module


def arguments(work: Path, **changes: object) -> argparse.Namespace:
    given = {
        "work": work,
        "device": "cpu",
        "minutes": None,
        "steps": 3,
        "batch": 1,
        "every": 1,
        "pictures": 1,
        "lr": None,
        "out": work / "exported",
        "seed": 0,
        "resume": False,
        "restart": False,
        "look": False,
        "focus": False,
        "local_share": 0.5,
    }
    return argparse.Namespace(**{**given, **changes})


def run_interrupted(
    monkeypatch: pytest.MonkeyPatch, train: ModuleType, stage: str, args: argparse.Namespace
) -> None:
    """Stop right after the first checkpoint is written, as Ctrl-C or a power cut would."""

    def save_and_stop(path: Path, **state: object) -> None:
        train_save(path, **state)
        raise KeyboardInterrupt

    train_save = train.save
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            getattr(train, stage)(args)


@pytest.mark.slow
def test_resumed_stages_equal_uninterrupted_ones_and_export(
    train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    stages = (
        ("train_tower", "tower", {}),
        ("train_llm", "llm", {"steps": 2}),
        ("train_llm", "llm", {"steps": 2, "look": True, "focus": True}),
        ("train_grown", "grow", {"steps": 2}),
    )
    for stage, name, changes in stages:
        getattr(train, stage)(arguments(whole, **changes))
        run_interrupted(monkeypatch, train, stage, arguments(pieces, **changes))
        getattr(train, stage)(arguments(pieces, resume=True, **changes))
        expected, got = (torch.load(work / f"{name}.pt")["module"] for work in (whole, pieces))
        assert expected.keys() == got.keys()
        for key in expected:
            assert torch.equal(expected[key], got[key]), (name, key)
    train.run_export(arguments(whole))
    assert (whole / "exported" / "model.safetensors").stat().st_size < 6 << 20
