"""A patched model in other hands: attention, copies, checkpoints, bad input."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from cache_name import CACHE
from hf_models import CASES, IMAGE, LAYERS, TEXT, VIT, Case, Row
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

import adsc_kernels as adsc
from adsc_kernels import CompressionSchedule, UnsupportedError
from adsc_kernels.integrations.hf import FAMILIES, Family, apply_adsc, register, remove_adsc

MADE = CASES["llava"]
SCHEDULE = "1:1/2,3:1/3"
GREEDY: dict[str, Any] = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    return MADE.model()


def unpadded(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What flash attention computes: 2D masks, rows unpadded, the last query sees the last key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = torch.zeros_like(query)
    for b in range(len(query)):
        real = torch.ones(key.shape[2], dtype=torch.bool)
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), key.shape[2])
            real = attention_mask[b].bool()
        asks = real[-query.shape[2] :]
        q, k, v = query[b][:, asks], key[b][:, real], value[b][:, real]
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if module.is_causal:  # the vision tower's is not
            seen = seen.tril(k.shape[1] - q.shape[1])
        scores = (q @ k.mT * scaling).masked_fill(~seen, -torch.inf)
        out[b][:, asks] = scores.softmax(-1) @ v
    return out.transpose(1, 2), None


AttentionInterface.register("unpadded", unpadded)
AttentionMaskInterface.register("unpadded", flash_attention_mask)
ALL_MASK_ATTENTION_FUNCTIONS.register("unpadded", flash_attention_mask)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eager", "unpadded"])
def test_kinds_of_attention_agree(model, kind):
    inputs = MADE.inputs(MADE.rows())
    other = MADE.model(kind)
    with apply_adsc(model, SCHEDULE) as applied, apply_adsc(other, SCHEDULE):
        want, got = (m(**inputs).logits for m in (model, other))
        real = applied.columns >= 0
        assert torch.allclose(got[real], want[real], atol=1e-4)
        want, got = (m.generate(**inputs, **GREEDY) for m in (model, other))
        assert torch.equal(got, want)


@torch.no_grad()
def test_flex_attention_agrees(model):
    """Uncompiled: on a CPU its compiler would take minutes."""
    inputs, other = MADE.inputs(MADE.rows()), MADE.model("flex_attention")
    with (
        torch.compiler.set_stance("force_eager"),
        apply_adsc(model, SCHEDULE) as applied,
        apply_adsc(other, SCHEDULE),
    ):
        want, got = (m(**inputs).logits for m in (model, other))
        assert torch.allclose(got[applied.columns >= 0], want[applied.columns >= 0], atol=1e-4)
        want, got = (m.generate(**inputs, **GREEDY) for m in (model, other))
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_given_each_stages_padding(model, kind, monkeypatch):
    """Its kernels need a GPU: only the masks that would reach them are looked at here."""
    seen: list[Tensor | None] = []

    def attend(module: Any, query: Tensor, *rest: Any, **more: Any) -> Any:
        if module.is_causal:
            seen.append(rest[2])
        return unpadded(module, query, *rest, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, kind, attend)
    other = copy.deepcopy(model)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = kind
    inputs = MADE.inputs(MADE.rows())
    with apply_adsc(model, SCHEDULE) as applied, apply_adsc(other, SCHEDULE):
        want, got = (m(**inputs).logits for m in (model, other))
        real = applied.columns >= 0
        assert torch.allclose(got[real], want[real], atol=1e-4)
    assert [mask.sum(1).tolist() for mask in seen] == [
        [6 + 2 * kept, 3 + kept, 5] for kept in (25, 13, 13, 5)
    ]


@torch.no_grad()
def test_attentions_and_hidden_states_are_as_long_as_their_stage():
    model = MADE.model("eager")
    row = MADE.rows()[0]
    with apply_adsc(model, SCHEDULE):
        out = model(**MADE.inputs([row]), output_attentions=True, output_hidden_states=True)
    lens = [56, 6 + 26, 6 + 26, 6 + 10]
    assert [a.shape[-1] for a in out.attentions] == lens
    assert [h.shape[1] for h in out.hidden_states[1:]] == lens


@torch.no_grad()
def test_copies_and_checkpoints_keep_what_they_should(model, tmp_path):
    inputs = MADE.inputs(MADE.rows())
    with apply_adsc(model, SCHEDULE):
        want = model(**inputs).logits
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "adsc_schedule")
    fresh = MADE.model()  # once transformers has captured outputs of one, it can't be pickled
    apply_adsc(fresh, SCHEDULE)
    for other in (twin, pickle.loads(pickle.dumps(fresh))):
        assert torch.equal(other(**inputs).logits, want)
        answer = other.generate(**inputs, **GREEDY)
        remove_adsc(other)
        assert other(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    back = hf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    with apply_adsc(back) as applied:
        assert str(applied.schedule) == SCHEDULE
        assert torch.equal(back(**inputs).logits, want)
        assert torch.equal(back.generate(**inputs, **GREEDY), answer)
    assert back.config.adsc_schedule == CompressionSchedule.parse(SCHEDULE, LAYERS).to_dict()


def test_a_model_is_freed_at_once():
    model = MADE.model()
    apply_adsc(model, SCHEDULE)
    with torch.no_grad():
        model.generate(**MADE.inputs(MADE.rows()), **GREEDY)
    gone = weakref.ref(model.lm_head)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_the_report_says_what_was_touched(model):
    with adsc.apply_adsc(model, SCHEDULE) as applied:
        assert applied.family.model_type == "llava"
        assert applied.decoder == "model.language_model"
        assert applied.num_layers == LAYERS
        assert applied.columns is None
        assert "hooks on the 4 layers of model.language_model" in repr(applied)


class Other(torch.nn.Module):
    """No model of transformers."""


@pytest.mark.parametrize(
    ("make", "schedule", "error", "says"),
    [
        (Other, SCHEDULE, TypeError, "expected a transformers PreTrainedModel, got Other"),
        (
            lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)),
            SCHEDULE,
            UnsupportedError,
            "gemma3.*got clip_vision_model",
        ),
        (MADE.model, CompressionSchedule.parse("1:1/2", 5), ValueError, "for 4 layers, got.* 5"),
        (MADE.model, "9:1/2", ValueError, "0 to 3"),
        (MADE.model, 3, TypeError, "CompressionSchedule or its text, got int"),
        (MADE.model, None, ValueError, "config holds none"),
    ],
)
def test_bad_models_and_schedules(make, schedule, error, says):
    model = make()
    with pytest.raises(error, match=says):
        apply_adsc(model, schedule)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("decoder", "missing"),
    [
        ("language_model", "language_model"),
        ("embeddings", "embeddings.layers"),
        ("encoder", "encoder.rotary_emb"),
    ],
)
def test_a_model_without_a_decoder_is_refused(decoder, missing):
    register(Family("clip_vision_model", lambda base, given: [], decoder=decoder))
    try:
        with pytest.raises(UnsupportedError, match=f"expected {missing}, got CLIPVisionModel"):
            apply_adsc(hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)), SCHEDULE)
    finally:
        del FAMILIES["clip_vision_model"]


def test_one_schedule_at_a_time(model):
    with pytest.raises(ValueError, match="hasn't"):
        remove_adsc(model)
    with apply_adsc(model, SCHEDULE), pytest.raises(ValueError, match="remove_adsc first"):
        apply_adsc(model, SCHEDULE)


def prompt() -> Any:
    return MADE.inputs(MADE.rows()[:1])


def without(name: str) -> Any:
    return {key: value for key, value in prompt().items() if key != name}


def embeds(**more: Any) -> Any:
    return {"inputs_embeds": torch.zeros(1, 40, 32), **more}


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: embeds(), ValueError, "vision_spans: expected with inputs_embeds.*row, column"),
        (lambda: embeds(vision_spans=[(0, 30, 11)]), ValueError, r"within \[1, 40\]"),
        (lambda: embeds(vision_spans=[(1, 3, 4)]), ValueError, r"within \[1, 40\]"),
        (lambda: embeds(vision_spans=[(0, 3, 4), (0, 5, 4)]), ValueError, "vision_spans"),
        (
            lambda: embeds(vision_spans=[(0, 3, 4)], attention_mask=(torch.arange(40) > 3)[None]),
            ValueError,
            r"no padding in \(0, 3, 4\)",
        ),
        (
            lambda: embeds(
                pixel_values=torch.zeros(1, 3, 20, 20), mm_token_type_ids=torch.zeros(1, 40)
            ),
            ValueError,
            "vision_spans: expected with inputs_embeds.*row, column",
        ),
        (
            lambda: {**prompt(), "pixel_values_videos": torch.zeros(1, 3, 20, 20)},
            UnsupportedError,
            "expected no videos with llava",
        ),
        (
            lambda: {
                **prompt(),
                "pixel_values": prompt()["pixel_values"],
                "input_ids": prompt()["input_ids"][:, :50],
            },
            ValueError,
            "25 placeholder tokens in the 25 from column 30",
        ),
        (
            lambda: {**prompt(), "attention_mask": torch.ones(1, 1, 56, 56)},
            UnsupportedError,
            "4D|shape",
        ),
        (
            lambda: {**prompt(), "attention_mask": torch.ones(1, 9)},
            ValueError,
            r"\(1, 56\).*\(1, 9\)",
        ),
        (lambda: {**prompt(), "labels": torch.ones(1, 9, dtype=torch.long)}, ValueError, "labels"),
        (lambda: {**prompt(), "shift_labels": torch.ones(1, 56)}, UnsupportedError, "shift_labels"),
        (lambda: {**prompt(), "logits_to_keep": torch.tensor([3])}, UnsupportedError, "an int"),
        (lambda: {**prompt(), "logits_to_keep": 5}, ValueError, "text in the last 5"),
        (lambda: {**prompt(), CACHE: 3}, UnsupportedError, "expected a Cache, got int"),
    ],
)
def test_bad_calls(model, call, error, says):
    with apply_adsc(model, SCHEDULE), pytest.raises(error, match=says):
        model(**call())


@torch.no_grad()
@pytest.mark.skipif(CACHE != "cache", reason="before 5.24 transformers forgets the pictures there")
def test_a_prefill_in_chunks_is_refused(model):
    chunks = dict(prefill_chunk_size=16, **{CACHE: hf.DynamicCache()})
    with apply_adsc(model, SCHEDULE), pytest.raises(UnsupportedError, match="prefill_chunk_size"):
        model.generate(**prompt(), **GREEDY, **chunks)


@torch.no_grad()
def test_a_call_of_the_decoder_alone_is_refused(model):
    with apply_adsc(model, SCHEDULE), pytest.raises(ValueError, match="whole model"):
        model.base_model.language_model(input_ids=torch.tensor([[5]]))


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_to_the_next(model, monkeypatch):
    decoder = model.base_model.language_model
    with apply_adsc(model, SCHEDULE):
        with monkeypatch.context() as patch:
            patch.setattr(model.base_model, "get_image_features", None)
            with pytest.raises(TypeError):
                model(**prompt())
        with pytest.raises(ValueError, match="whole model"):
            decoder(input_ids=torch.tensor([[5]]))


@pytest.mark.parametrize(
    ("given", "says"),
    [({}, "the decoder's other arguments"), ({"adsc_pass": None}, "position_embeddings")],
)
def test_a_decoder_that_keeps_its_arguments_to_itself_is_refused(model, given, says):
    with (
        apply_adsc(model, SCHEDULE),
        pytest.raises(UnsupportedError, match=f"expected one that hands {says} on to its layers"),
    ):
        model.base_model.language_model.layers[1](torch.zeros(1, 3, 32), **given)


@torch.no_grad()
def test_layers_without_positions_cannot_renumber_them(model):
    layer = model.base_model.language_model.layers[1]

    def without(_, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "position_ids"}

    with layer.register_forward_pre_hook(without, with_kwargs=True):
        with apply_adsc(model, "1:1/2"):
            model(**prompt())  # rows carry their own embeddings along
        with (
            apply_adsc(model, "1:1/2@renumber"),
            pytest.raises(UnsupportedError, match="positions: expected layers that are given"),
        ):
            model(**prompt())


@torch.no_grad()
def test_features_behind_the_last_layer_are_refused():
    made = CASES["qwen3_vl"]
    config = made.config()
    config.text_config.num_hidden_layers = 2
    with (
        apply_adsc(Case(lambda: config, made.rows).model(), "1:1/2") as applied,
        pytest.raises(UnsupportedError, match="expected fewer than the 2 layers, got 2"),
    ):
        applied.model(**made.inputs(made.rows()))


class Kept(hf.cache_utils.DynamicCache):
    """A cache of someone else's."""


@torch.no_grad()
def test_other_caches_are_refused(model):
    with (
        apply_adsc(model, SCHEDULE),
        pytest.raises(UnsupportedError, match="StaticCache, got Kept"),
    ):
        model(**prompt(), **{CACHE: Kept()})


@torch.no_grad()
def test_a_row_that_loses_all_is_refused(model):
    row = Row().grid(5, 5).give(pixel_values=torch.zeros(1, 3, 20, 20))
    with apply_adsc(model, "1:0"), pytest.raises(ValueError, match="in row 0 behind boundary 0"):
        model(**MADE.inputs([row]))


@torch.no_grad()
def test_a_token_that_looks_like_a_picture_is_text_in_an_answer(model):
    """A call has pictures if it is given some, whatever its tokens and their number are."""
    with apply_adsc(model, SCHEDULE):
        cache = model(**prompt()).past_key_values
        before = [layer.get_seq_length() for layer in cache.layers]
        model(input_ids=torch.full((1, 7), IMAGE), **{CACHE: cache})
        assert [n.get_seq_length() for n in cache.layers] == [n + 7 for n in before]


def test_families_can_be_added():
    from adsc_kernels.integrations.hf.families import square

    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1],
    )
    model = hf.VipLlavaForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedError, match="vipllava; an adapter for it can be added"):
        apply_adsc(model, SCHEDULE)
    register(Family("vipllava", lambda base, given: square(25)))
    try:
        with torch.no_grad(), apply_adsc(model, "1:1/5"):
            assert model(**prompt()).logits.shape[1] == 6 + 10
    finally:
        del FAMILIES["vipllava"]
