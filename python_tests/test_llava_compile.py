"""torch.compile as an option of the thin model: the same tokens, and few programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llava_case import IMAGES, PROMPTS
from tiny_checkpoints import make_checkpoint

from adsc_kernels.llava import Llava


@pytest.fixture
def model(tmp_path: Path) -> Llava:
    make_checkpoint(tmp_path, seed=5, layers=2, kv_heads=2)
    torch._dynamo.reset()
    return Llava.from_pretrained(tmp_path, "1:1/2", device="cpu")


def test_tokens_and_programs(model: Llava) -> None:
    """Traced whole, by Dynamo alone: what Inductor makes of it is its own matter."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def tokens(first: str) -> list[list[int]]:
        prompts = [first, PROMPTS[1]]
        return model.generate(prompts, IMAGES[:2], max_new_tokens=3).token_ids

    prompts = (PROMPTS[0], PROMPTS[0].replace("w1", "w9"), f"{PROMPTS[0]} w3")
    want = [tokens(prompt) for prompt in prompts]
    model.compile(backend=backend, fullgraph=True)
    assert tokens(prompts[0]) == want[0]
    made = graphs
    assert made <= 3  # the prompts; a step; and a step of any length, as SDPA counts on the host
    assert tokens(prompts[1]) == want[1]
    assert graphs == made  # a layout is compiled once
    assert tokens(prompts[2]) == want[2]
    assert graphs <= made + 2  # of other lengths: prompts of any lengths, from here on
