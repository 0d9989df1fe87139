"""A patched model that is compiled: calls with pictures, and the steps of a static cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from cache_name import CACHE
from hf_models import CASES, Case, Row, noise
from torch import Tensor

from adsc_kernels.integrations.hf import apply_adsc, hooks

MADE = CASES["llava"]
SCHEDULE = "1:1/2,3:1/3"
GREEDY: dict[str, Any] = dict(do_sample=False, pad_token_id=0)


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def kept_in(graphs: list[Any]) -> Callable[..., Any]:
    """A backend that runs what Dynamo has traced as it is."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def shallow() -> Any:
    """Two layers and one in the tower: Dynamo takes its time for each."""
    config = MADE.config()
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 2, 1
    return Case(lambda: config, MADE.rows).model()


def batch(*texts: tuple[int, int]) -> dict[str, Any]:
    """A row for each, with a picture between so many tokens of text."""
    rows = []
    for seed, (before, behind) in enumerate(texts):
        row = Row().text(*range(10, 10 + before)).grid(5, 5).text(*range(30, 30 + behind))
        rows.append(row.give(pixel_values=noise(seed, 1, 3, 20, 20)))
    return MADE.inputs(rows)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="2.11's Dynamo fails at the model's masked_scatter: PendingUnbackedSymbolNotFound",
)
def test_compiled_calls_with_pictures_are_compiled_once(graphs, monkeypatch):
    """Neither where pictures lie nor how much of a batch is padding is compiled into a graph."""
    batches = [
        batch((4, 4), (1, 2)),  # 33 wide: of 32 Dynamo would think it is the hidden size
        batch((3, 5), (0, 2)),
        batch((9, 4), (1, 2)),
        batch((4, 4), (1, 9)),
    ]
    model = shallow()

    def answer(inputs: Any) -> Iterator[Tensor]:
        """Logits of a prompt and of a token behind it."""
        out = model(**inputs)
        yield out.logits
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": torch.tensor([[11], [12]]), "attention_mask": mask}
        yield model(**step, **{CACHE: out.past_key_values}).logits

    with apply_adsc(model, "1:1/2@renumber"):
        want = [tuple(answer(inputs)) for inputs in batches]
        monkeypatch.setattr(hooks, "pieces_of", None)  # what pictures are made of is read once
        # The model's own check of its placeholders would break graphs without the first; the second
        # spares Dynamo to trace what calls a function, too, where a graph breaks.
        flags = dict(capture_scalar_outputs=True, nested_graph_breaks=True)
        with torch._dynamo.config.patch(**flags):
            model.compile(backend=kept_in(graphs), dynamic=True)
            counts = []
            for inputs, expected in zip(batches, want, strict=True):
                for found, logits in zip(answer(inputs), expected, strict=True):
                    torch.testing.assert_close(found, logits)
                    counts.append(len(graphs))
    assert 0 < counts[0] <= 4
    assert counts[2:] == [counts[1]] * 6


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_step_is_compiled_once(graphs):
    """The step of a static cache has the same shapes all along: one graph serves all tokens."""
    config = hf.CompileConfig(backend=kept_in(graphs), mode=None)
    config._compile_all_devices = True
    model, inputs = MADE.model(), MADE.inputs(MADE.rows())
    options = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12}
    counts = []
    for schedule in ("1:1", SCHEDULE, "0:1/2,2:1/3@renumber"):
        torch._dynamo.reset()
        graphs.clear()
        with apply_adsc(model, schedule):
            static = {**options, "cache_implementation": "static", "compile_config": config}
            assert torch.equal(
                model.generate(**inputs, **static), model.generate(**inputs, **options)
            )
        counts.append(len(graphs))
    assert counts[0] > 0
    assert counts == [counts[0]] * 3
