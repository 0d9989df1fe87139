"""What transformers does on a GPU alone: compiles a static cache's steps and flex attention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from cache_name import CACHE
from hf_models import CASES, IMAGE, TEXT, VIT

from adsc_kernels.integrations.hf import apply_adsc

pytestmark = pytest.mark.skipif(
    torch.get_default_device().type != "cuda", reason="ADSC_HF_DEVICE names no GPU"
)
MADE = CASES["llava"]
SCHEDULE = "1:1/2,3:1/3"
GREEDY: dict[str, Any] = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)


def wide(attention: str) -> Any:
    """Heads of 16: Triton's flex attention takes none that are smaller."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT, projection_dim=16),
        text_config=hf.LlamaConfig(**{**TEXT, "head_dim": 16}, initializer_range=0.2),
        image_token_index=IMAGE,
        image_seq_length=25,
    )
    torch.manual_seed(0)
    make = hf.LlavaForConditionalGeneration._from_config
    return make(config, attn_implementation=attention).eval()


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["1:1", SCHEDULE, "0:1/2,2:1/3@renumber"])
def test_compiled_steps_of_a_static_cache_give_the_same_tokens(schedule):
    model, inputs = MADE.model(), MADE.inputs(MADE.rows())
    with apply_adsc(model, schedule):
        want = model.generate(**inputs, **GREEDY)
        for _ in range(2):  # recorded, then replayed
            got = model.generate(**inputs, **GREEDY, cache_implementation="static")
            assert torch.equal(got, want)


@torch.no_grad()
def test_compiled_flex_attention_agrees():
    inputs = MADE.inputs(MADE.rows())
    plain, flex = wide("sdpa"), wide("flex_attention")
    with apply_adsc(plain, SCHEDULE) as applied, apply_adsc(flex, SCHEDULE):
        want, got = (model(**inputs).logits for model in (plain, flex))
        real = applied.columns.cuda() >= 0
        assert torch.allclose(got[real], want[real], atol=1e-2 * float(want[real].abs().max()))
        tokens = [model.generate(**inputs, **GREEDY) for model in (plain, flex)]
    assert torch.equal(*tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_near_as_without_a_schedule(name):
    made = CASES[name]
    model, inputs = made.model(), made.inputs(made.rows())

    def error(schedule: str) -> float:
        with apply_adsc(model.float(), schedule) as applied:
            want = model(**inputs).logits
            real = applied.columns.cuda() >= 0
            model.bfloat16()
            half = {n: x.bfloat16() if x.is_floating_point() else x for n, x in inputs.items()}
            got = model(**half).logits
        assert got.dtype == torch.bfloat16
        return float((got - want)[real].abs().mean() / want[real].abs().mean())

    dense = error("1:1")
    model = made.model()
    assert error(SCHEDULE) < 2 * dense


@torch.no_grad()
def test_waits_for_the_device_are_those_of_the_model_and_one_for_pictures():
    model, inputs = MADE.model(), MADE.inputs(MADE.rows()[:1])
    step = {"input_ids": torch.tensor([[9]])}

    def waits(schedule: str | None) -> list[int]:
        if schedule is not None:
            apply_adsc(model, schedule)
        found = []
        for call in (inputs, step):
            cache = model(**inputs).get(CACHE) if call is step else None
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                model(**call, **{CACHE: cache})
                torch.cuda.set_sync_debug_mode("default")
            found.append(sum("synchroniz" in str(w.message) for w in seen))
        return found

    prefill, decode = waits(None)
    assert waits(SCHEDULE) == [prefill + 1, decode]
