"""docs/accuracy.md says what docs/accuracy.json holds; shipped adapters do what their cards say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from adsc_kernels.adapters import read_schedule
from adsc_kernels.baselines import make_method
from adsc_kernels.baselines.batch import answered, encode
from adsc_kernels.hub import bundled_checkpoint
from adsc_kernels.llava import Llava, load_image

ROOT = Path(__file__).parents[1]
ADAPTERS = sorted((bundled_checkpoint() / "adapters").iterdir())


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import accuracy_page

        yield accuracy_page
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_the_pages_are_those_of_the_results(tool: ModuleType) -> None:
    data = tool.read()
    for name in tool.PAGES:
        assert tool.page(name, data) == (ROOT / "docs" / name).read_text(encoding="utf-8"), name


def test_every_measurement_has_its_place(tool: ModuleType) -> None:
    data = tool.read()
    placed = sum(map(len, tool.grouped(data).values())) + len(tool.dense_runs(data))
    assert placed == len(data["runs"]) > 0
    assert {run["questions"] for run in data["runs"]} == {data["about"]["questions"]}
    assert data["about"]["questions"] >= 2000
    for (row, budget), runs in tool.grouped(data).items():
        assert row in tool.NAMES
        assert all(run["average"] <= int(budget) for run in runs)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda path: path.name)
def test_a_shipped_adapter_answers_as_its_card_says(adapter: Path) -> None:
    folder = bundled_checkpoint()
    assert sum(file.stat().st_size for file in adapter.iterdir()) < 2_000_000
    known = json.loads((folder / "pictures" / "questions.json").read_text())
    asked = [(load_image(folder / "pictures" / name), q) for name, qs in known.items() for q in qs]
    images = [image for image, _ in asked]
    prompts = [f"USER: <image>\n{q['question']} ASSISTANT:" for _, q in asked]
    right = []
    for given in (adapter, None):
        model = Llava.from_pretrained(folder, None, "cpu", torch.float32, adapter=given)
        method = make_method("adsc", model.config, schedule=read_schedule(adapter))
        assert method.average <= int(adapter.name)
        with torch.no_grad():
            answers = [q["answer"] for _, q in asked]
            batch = encode(model, prompts, answers, images, range(len(prompts)))
            right.append(sum(answered(model, batch, *method.hidden(model, batch))))
    # Above 64 the model without one is near dense's level: what is gained is noise on four.
    assert right[0] > right[1] or adapter.name != "64"
    assert right[0] > 0.85 * len(asked)  # 95 % over many pictures; these are four
