"""adsc merge: the shipped adapter in a checkpoint of its own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import make_checkpoint
from transformers import AutoModelForImageTextToText

from adsc_kernels import adapters
from adsc_kernels.adapters import read_lora, read_schedule
from adsc_kernels.cli import main
from adsc_kernels.cli.run import default_schedule
from adsc_kernels.hub import bundled_checkpoint
from adsc_kernels.integrations.hf import apply_adsc
from adsc_kernels.llava import Llava, load_image

MODEL = bundled_checkpoint()
ADAPTER = MODEL / "adapters" / "64"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merge") / "merged"
    assert main(["merge", "--adapter", str(ADAPTER), "--out", str(out)]) == 0
    return out


def test_weights_are_the_models_and_the_adapters_rounded_once(merged: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (MODEL, merged))
    scale, pairs = read_lora(ADAPTER)
    assert scale == 2 and len(pairs) == 16 * 7
    added = {
        f"{name.replace('model.language_model', 'language_model.model')}.weight": (
            scale * b.float() @ a.float()
        )
        for name, (a, b) in pairs.items()
    }
    assert before.keys() == after.keys() > added.keys()
    for name, weight in before.items():
        want = (weight.float() + added.get(name, torch.zeros(()))).to(weight.dtype)
        assert after[name].dtype == weight.dtype and torch.equal(after[name], want), name


def test_a_merged_checkpoint_says_its_schedule_and_answers_as_the_adapter(merged: Path) -> None:
    schedule = str(read_schedule(ADAPTER))
    config = json.loads((merged / "config.json").read_text())
    assert config == {**json.loads((MODEL / "config.json").read_text()), "adsc_schedule": schedule}
    assert {p.name for p in merged.iterdir()} == {
        p.name for p in MODEL.iterdir() if p.is_file()
    } - {"README.md"}
    known = json.loads((MODEL / "pictures" / "questions.json").read_text())
    name, asked = next(iter(known.items()))
    prompts = [f"USER: <image>\n{one['question']} ASSISTANT:" for one in asked[:6]]
    images = [[load_image(MODEL / "pictures" / name)]] * len(prompts)
    said = []
    for folder, adapter in ((merged, None), (MODEL, ADAPTER)):
        model = Llava.from_pretrained(folder, schedule, "cpu", torch.float32, adapter=adapter)
        said.append(model.generate(prompts, images, max_new_tokens=12).texts)
    assert said[0] == said[1]
    right = [text.strip() == one["answer"] for text, one in zip(said[0], asked, strict=False)]
    assert sum(right) >= 5


def test_a_merged_checkpoint_brings_its_schedule_to_transformers_and_to_run(merged: Path) -> None:
    schedule = str(read_schedule(ADAPTER))
    model = AutoModelForImageTextToText.from_pretrained(merged)
    with apply_adsc(model) as applied:
        assert str(applied.schedule) == schedule
    assert model.config.adsc_schedule == schedule
    assert str(default_schedule(model.config, 16)) == schedule


def test_what_is_refused_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "tiny", layers=16)
    make_checkpoint(tmp_path / "shallow")
    out = tmp_path / "out"
    capsys.readouterr()

    def refused(says: str, out: Path = out, **given: Any) -> None:
        options = [f"--{name}={value}" for name, value in {"adapter": ADAPTER, **given}.items()]
        assert main(["merge", "--out", str(out), *options]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
        assert not list(tmp_path.glob("out*"))

    refused("expected one of this model, got one of another", model=tmp_path / "tiny")
    refused("of 16 layers, which the adapter was trained under", model=tmp_path / "shallow")
    refused("no such file", adapter=tmp_path / "none")
    refused("expected a folder that is not there yet", out=tmp_path / "tiny")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "save_file", full)
    refused("can't be written ([Errno 28] No space left on device)")
