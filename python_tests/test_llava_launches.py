"""How often the thin model's decoder asks the device for something: prefill and a step of decode.

Each op that reaches the device's kernels counts as one launch, views as none. Until weights were
fused a layer took 37, counted alike. The pieces of `pointwise` are one Triton kernel each on a GPU,
and stand here as one op each; attention is one sequence's, one op with any backend.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from llava_case import IMAGES, PROMPTS, begin
from tiny_checkpoints import make_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from adsc_kernels import pointwise
from adsc_kernels.cache import Phase
from adsc_kernels.decode import DecodeState
from adsc_kernels.llava import Llava
from adsc_kernels.plan import make_plan
from adsc_kernels.sampling import choose

BEFORE = 37  # launches of a layer of prefill


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not op.is_view:
            self.ops[str(op)] += 1
        return op(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llava, Llava]:
    """The same but for four more layers."""
    made = []
    for layers in (4, 8):
        folder = tmp_path_factory.mktemp("checkpoint")
        make_checkpoint(folder, layers=layers, kv_heads=2)
        made.append(Llava.from_pretrained(folder, device="cpu"))
    return made[0], made[1]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as the Triton ones are called, each of them one op."""
    from adsc_kernels.triton import pointwise as kernels

    def rotate_(qkv: Any, rope: Any, num_kv_heads: int, place: Any) -> None:
        qkv.sub_(0)

    def silu_mul(gate_up: Any) -> Any:
        return torch.nn.functional.silu(gate_up[:, ::2])

    monkeypatch.setattr(pointwise, "triton_runs", lambda device: True)
    monkeypatch.setattr(kernels, "rotate_", rotate_)
    monkeypatch.setattr(kernels, "silu_mul", silu_mul)


def prefill(model: Llava) -> Counter[str]:
    talk, _ = begin(model, PROMPTS[:1], IMAGES[:1])
    plan = make_plan(model.schedule, [0, len(talk.tokens[0])], talk.vision_spans)
    talk.cache.fit(plan)
    x = torch.randn(plan.stages[0].num_tokens, model.config.hidden_size)
    with torch.no_grad(), Launches() as launches:
        model(x, plan, Phase.PREFILL, talk.cache)
    return launches.ops


def step(model: Llava, size: int = 3) -> Counter[str]:
    """Of decoding one token of each sequence, chosen too."""
    cache = model.new_cache(size)
    for stage in cache.stages:
        stage.fit([9] * size)
        stage.lens = (4, 7, 1)[:size]
    state = DecodeState(cache, [4, 7, 1][:size], 1)
    with torch.no_grad(), Launches() as launches:
        choose(model.decode(torch.tensor([5, 6, 7])[:size], state), 0.0, 1.0, torch.Generator())
    return launches.ops


def of_a_layer(shallow: Counter[str], deep: Counter[str]) -> float:
    return (deep.total() - shallow.total()) / 4


def test_a_layer_of_prefill(models: tuple[Llava, Llava], as_on_a_gpu: None) -> None:
    one, two = (prefill(model) for model in models)
    assert of_a_layer(one, two) <= BEFORE / 4, two - one
    assert one.total() - 4 * of_a_layer(one, two) <= 20  # what a stage and the batch take


def test_a_layer_of_prefill_without_triton(models: tuple[Llava, Llava]) -> None:
    assert of_a_layer(*(prefill(model) for model in models)) <= 14


def test_a_boundary_costs_nothing_but_its_stage(
    models: tuple[Llava, Llava], as_on_a_gpu: None
) -> None:
    dense = prefill(models[0])
    compressed = prefill(models[0].with_schedule("1:1/2,3:1/3"))
    assert compressed.total() - dense.total() <= 2 * 20


def test_a_step_of_decoding(models: tuple[Llava, Llava], as_on_a_gpu: None) -> None:
    """What 32 layers in three stages take, without a graph."""
    deep, shallow = (step(model, size=1) for model in reversed(models))
    layer = of_a_layer(shallow, deep)
    staged = step(models[0].with_schedule("1:1/2,3:1/3"), size=1).total()
    assert 32 * layer + (staged - 4 * layer) <= 400


@torch.no_grad()
def test_rows_that_a_boundary_drops_skip_what_is_left_of_the_layer(
    models: tuple[Llava, Llava],
) -> None:
    model = models[0].with_schedule("1:1/2,3:1/3")
    talk, _ = begin(model, PROMPTS[:1], IMAGES[:1])
    plan = make_plan(model.schedule, [0, len(talk.tokens[0])], talk.vision_spans)
    rows: dict[str, list[int]] = {"qkv_proj": [], "o_proj": [], "down_proj": []}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, n=n: rows[n].append(len(args[0])))
        for path, module in model.language_model.named_modules()
        if (n := path.rpartition(".")[2]) in rows
    ]
    model(torch.randn(plan.stages[0].num_tokens, model.config.hidden_size), plan, Phase.PREFILL)
    for hook in hooks:
        hook.remove()
    first, second, third = (stage.num_tokens for stage in plan.stages)
    assert first > second > third
    assert rows["qkv_proj"] == [first, second, second, third]
    assert rows["o_proj"] == rows["down_proj"] == [second, second, third, third]
