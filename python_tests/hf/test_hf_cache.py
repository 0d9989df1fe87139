"""Generation, later turns and caches of a patched LLaVA: each is what running all at once gives."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cache_name import CACHE
from hf_models import CASES, IMAGE, LAYERS, Row, noise
from hf_oracle import oracle
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

from adsc_kernels import CompressionSchedule, UnsupportedError
from adsc_kernels.integrations.hf import apply_adsc
from adsc_kernels.integrations.hf.compat import writes_where_told

MADE = CASES["llava"]
NEW = 6
GREEDY: dict[str, Any] = dict(
    max_new_tokens=NEW,
    min_new_tokens=NEW,
    do_sample=False,
    pad_token_id=0,
    disable_compile=True,  # static caches' steps, which are compiled on GPUs alone
    suppress_tokens=[IMAGE],  # transformers would look for its picture where nothing is cached
)
SCHEDULES = ["1:1/2,3:1/3", "0:2/3,2:1/4@linspace@renumber"]

TOLD = writes_where_told()  # as transformers 5.0 has it
STATIC = pytest.mark.skipif(TOLD, reason="refused there")
# Neither is so without a schedule in 5.0 and 5.17.
THEIRS = pytest.mark.skipif(CACHE != "cache", reason="transformers' own, before 5.24")


@pytest.fixture(scope="module")
def model():
    return MADE.model()


@pytest.fixture(params=SCHEDULES)
def patched(model, request):
    with apply_adsc(model, request.param) as applied:
        yield applied


def lengths(cache: Any) -> list[int]:
    return [int(layer.get_seq_length()) for layer in cache.layers]


def kept(applied: Any, *pictures: int) -> list[int]:
    """Vision tokens of each layer."""
    schedule = applied.schedule
    counts = [schedule.kept(n) for n in pictures]
    return [sum(c[schedule.stage_of_layer(n)] for c in counts) for n in range(LAYERS)]


def joined(first: Row, answer: list[int], second: Row) -> Row:
    """A conversation as one sequence."""
    whole = copy.deepcopy(first).text(*answer)
    shift = len(whole.ids)
    whole.ids += second.ids
    whole.grids += [[[n + shift for n in line] for line in grid] for grid in second.grids]
    for name, values in second.inputs.items():
        whole.give(**{name: torch.cat(values)})
    return whole


def second_turn(seed: int) -> Row:
    row = Row().text(21, 22).grid(5, 5).text(23, seed)
    return row.give(pixel_values=noise(seed, 1, 3, 20, 20))


@torch.no_grad()
def test_greedy_answers_are_the_oracles(model, patched):
    row = MADE.rows()[0]
    ids = model.generate(**MADE.inputs([row]), **GREEDY)[0]
    schedule = patched.schedule
    plain = MADE.model()
    for n in range(len(row.ids), len(ids)):
        inputs = {**MADE.inputs([row]), "input_ids": ids[None, :n]}
        logits, _ = oracle(plain, inputs, row.grids, schedule)
        logits[:, IMAGE] = -torch.inf
        assert logits[-1].argmax() == ids[n]


@torch.no_grad()
def test_each_layers_cache_is_as_short_as_its_stage(model, patched):
    row = MADE.rows()[0]
    cache = model(**MADE.inputs([row])).past_key_values
    text = len(row.ids) - 50
    want = [text + n for n in kept(patched, 25, 25)]
    assert lengths(cache) == want
    got = sum(x.untyped_storage().nbytes() for n in cache.layers for x in (n.keys, n.values))
    assert got == sum(want) * 2 * 2 * 8 * 4  # K and V, 2 heads of 8 float32


@STATIC
@torch.no_grad()
@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_a_static_cache_gives_the_same_and_is_as_short(model, patched, rows):
    inputs = MADE.inputs([MADE.rows()[n] for n in rows])
    options = {**GREEDY, "return_dict_in_generate": True}
    want = model.generate(**inputs, **options)
    got = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(got.sequences, want.sequences)
    assert lengths(got.past_key_values) == lengths(want.past_key_values)
    allocated = [layer.keys.shape[2] for layer in got.past_key_values.layers]
    dropped = [lengths(want.past_key_values)[0] - n for n in lengths(want.past_key_values)]
    assert [allocated[0] - n for n in allocated] == dropped


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=STATIC)])
def test_a_second_turn_is_the_whole_conversation(model, patched, kind):
    first = MADE.rows()[0]
    cache = None
    if kind == "static":
        cache = StaticCache(model.config.get_text_config(), max_cache_len=200)
    options = {**GREEDY, "return_dict_in_generate": True}
    turn = model.generate(**MADE.inputs([first]), **options, **{CACHE: cache})
    ids = turn.sequences[0].tolist()
    later = second_turn(24)
    whole = joined(first, ids[len(first.ids) :], later)
    inputs = {"input_ids": torch.tensor([whole.ids]), "pixel_values": noise(24, 1, 3, 20, 20)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    got = model.generate(**inputs, **options, **{CACHE: turn.past_key_values})
    want = model.generate(**MADE.inputs([whole]), **options)
    assert torch.equal(got.sequences, want.sequences)
    assert lengths(got.past_key_values) == lengths(want.past_key_values)


@torch.no_grad()
def test_later_turns_of_an_uneven_batch(model, patched):
    """Rows of other lengths with other pictures, then text alone, then pictures again."""
    rows, cache, mask = MADE.rows(), DynamicCache(), None
    turns = [rows, [Row().text(30 + n, 31) for n in range(3)]]
    turns.append([second_turn(24), Row().text(*range(20, 49)), second_turn(26)])
    for turn in turns:
        inputs = MADE.inputs(turn)
        here = inputs.pop("attention_mask", torch.ones_like(inputs["input_ids"]))
        mask = here if mask is None else torch.cat([mask, here], 1)
        got = model(**inputs, attention_mask=mask, **{CACHE: cache}).logits
    alone = rows
    for turn in turns[1:]:
        alone = [joined(row, [], more) for row, more in zip(alone, turn, strict=True)]
    for row, logits in zip(alone, got, strict=True):
        want = model(**MADE.inputs([row])).logits[0, -1]
        assert torch.allclose(logits[-1], want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(num_beams=3), marks=THEIRS),
        pytest.param(dict(num_beams=2, num_return_sequences=2), marks=THEIRS),
        dict(prompt_lookup_num_tokens=3),
        dict(do_sample=True, num_return_sequences=3),
        pytest.param(dict(num_beams=2, cache_implementation="static"), marks=THEIRS),
    ],
    ids=str,
)
def test_generation_with_a_cache_is_that_without(model, patched, options):
    inputs = MADE.inputs(MADE.rows()[:1] if "prompt_lookup_num_tokens" in options else MADE.rows())
    plain = {name: n for name, n in options.items() if "lookup" not in name and "cache" not in name}
    torch.manual_seed(0)
    want = model.generate(**inputs, **{**GREEDY, **plain}, use_cache=False)
    torch.manual_seed(0)
    got = model.generate(**inputs, **{**GREEDY, **options})
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("drafts", ["dense", "compressed"])
def test_what_an_assistant_drafts_changes_no_token(model, patched, drafts):
    """transformers hands it no pictures: its drafts are refused, and both caches cropped again and
    again, its own with no picture in it."""
    assistant = MADE.model()
    assistant.generation_config.assistant_confidence_threshold = 0
    if drafts == "compressed":
        apply_adsc(assistant, patched.schedule)
    inputs = MADE.inputs(MADE.rows()[:1])
    options = {**GREEDY, "max_new_tokens": 12, "return_dict_in_generate": True}
    del options["min_new_tokens"]  # which 5.0 refuses with an assistant
    want = model.generate(**inputs, **options)
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    got = model.generate(**inputs, **options, assistant_model=assistant)
    handle.remove()
    assert torch.equal(got.sequences, want.sequences)
    assert lengths(got.past_key_values) == lengths(want.past_key_values)
    assert len(calls) > 3


@torch.no_grad()
@pytest.mark.parametrize("left", [56, 50, 29, 12, 3])
def test_a_cropped_cache_is_that_of_the_shorter_prompt(model, patched, left):
    """Cropped behind the pictures, inside one, between and before them; then text is added."""
    row = MADE.rows()[0]
    cache = model(**MADE.inputs([row])).past_key_values
    model(input_ids=torch.tensor([[30, 31]]), **{CACHE: cache})
    cache.crop(left - len(row.ids) - 2)
    assert cache.get_seq_length() == left
    schedule = patched.schedule
    _, stages = oracle(MADE.model(), MADE.inputs([row]), row.grids, schedule)
    kept = [sum(column < left for column in stage) for stage in stages]
    assert lengths(cache) == [kept[schedule.stage_of_layer(n)] for n in range(LAYERS)]
    if schedule.positions == "renumber":
        assert [int(n) for n in cache.ledger.shifts] == [left - n for n in kept]
    got = model(input_ids=torch.tensor([[32, 33]]), **{CACHE: cache})
    # What was dropped of a picture that is cut is what the whole one lost.
    mask = torch.ones(1, len(row.ids) + 4)
    mask[:, left : len(row.ids) + 2] = 0
    whole = model(**MADE.inputs([row])).past_key_values
    model(input_ids=torch.tensor([[30, 31]]), **{CACHE: whole})
    ids = torch.arange(left, left + 2)[None]
    want = model(
        input_ids=torch.tensor([[32, 33]]),
        **{CACHE: whole},
        attention_mask=mask,
        position_ids=ids,
    )
    if patched.schedule.positions == "original" or left == 56:
        assert torch.allclose(got.logits, want.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_and_repeated(model, patched):
    rows = MADE.rows()
    new = torch.tensor([[30], [31], [32]])

    def prefilled() -> tuple[Any, Tensor]:
        inputs = MADE.inputs(rows)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1)], 1)
        return model(**inputs).past_key_values, mask

    cache, mask = prefilled()
    want = model(input_ids=new, **{CACHE: cache}, attention_mask=mask).logits
    for change, order in (
        (lambda c, n: c.reorder_cache(n), [2, 0, 1]),
        (lambda c, n: c.batch_select_indices(n), [1, 2]),
        (lambda c, n: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache, _ = prefilled()
        cache = copy.deepcopy(cache)
        chosen = torch.tensor(order)
        change(cache, chosen)
        got = model(input_ids=new[chosen], **{CACHE: cache}, attention_mask=mask[chosen])
        assert torch.allclose(got.logits, want[chosen], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["1:1/2", "0:1/2"])
def test_a_cache_without_pictures_is_cropped(model, schedule):
    ids = torch.arange(10, 30)[None]
    with apply_adsc(model, schedule):
        cache, cut = DynamicCache(), DynamicCache()
        model(input_ids=ids, **{CACHE: cache})
        cache.crop(-5)
        model(input_ids=ids[:, :15], **{CACHE: cut})
        assert lengths(cache) == lengths(cut) == [15] * LAYERS
        step = {"input_ids": torch.tensor([[9]])}
        got, want = (model(**step, **{CACHE: c}).logits for c in (cache, cut))
    assert torch.allclose(got, want, atol=1e-4)


@THEIRS
@torch.no_grad()
def test_a_cache_that_is_reset_is_new(model, patched):
    inputs = MADE.inputs(MADE.rows())
    cache = DynamicCache()
    want = model(**inputs, **{CACHE: cache}).logits
    cache.reset()
    assert torch.equal(model(**inputs, **{CACHE: cache}).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", pytest.param("static", marks=STATIC)])
def test_rows_of_one_length_that_lose_different_numbers(model, patched, kind):
    """No padding in the batch, but in its later stages."""
    one, two = MADE.rows()[0], Row().text(1).grid(5, 5).text(*range(20, 50))
    two.give(pixel_values=noise(9, 1, 3, 20, 20))
    assert len(one.ids) == len(two.ids)
    assert "attention_mask" not in MADE.inputs([one, two])
    options = {**GREEDY, "cache_implementation": kind}
    got = model.generate(**MADE.inputs([one, two]), **options)
    for row, ids in zip([one, two], got, strict=True):
        assert torch.equal(model.generate(**MADE.inputs([row]), **options)[0], ids)


@torch.no_grad()
def test_a_schedules_cache_is_not_anothers(model):
    inputs = MADE.inputs(MADE.rows()[:1])
    before = model(**inputs).past_key_values
    with apply_adsc(model, "1:1/2"):
        with pytest.raises(ValueError, match="filled without apply_adsc"):
            model(input_ids=torch.tensor([[9]]), **{CACHE: before})
        cache = model(**inputs).past_key_values
    other = CompressionSchedule.parse("1:1/4", LAYERS)
    with apply_adsc(model, other), pytest.raises(ValueError, match="schedule 1:1/4"):
        model(input_ids=torch.tensor([[9]]), **{CACHE: cache})


@STATIC
@torch.no_grad()
@pytest.mark.parametrize("schedule", ["1:1/2,3:1/3", "0:2/3,2:1/4@renumber"])
def test_layers_that_slide_hold_their_window(schedule):
    """Gemma 3, beyond its window in every stage; a static cache slides as a dynamic one does."""
    made = CASES["gemma3"]
    model, inputs = made.model(), made.inputs(made.rows())
    options = {**GREEDY, "return_dict_in_generate": True}
    with apply_adsc(model, schedule):
        want = model.generate(**inputs, **options, use_cache=False).sequences
        dynamic = model.generate(**inputs, **options)
        static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(dynamic.sequences, want)
    assert torch.equal(static.sequences, want)
    window = model.config.get_text_config().sliding_window
    for layer in dynamic.past_key_values.layers:
        if layer.is_sliding:
            assert layer.get_seq_length() > window == layer.keys.shape[2] + 1


class Stream(nullcontext):
    def wait_stream(self, other: Any) -> None: ...


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, pytest.param(StaticCache, marks=STATIC)])
def test_an_offloaded_cache_is_the_same(model, patched, kind, monkeypatch):
    """Without a GPU streams do nothing, and what is offloaded stays where it is."""
    moved: list[int] = []
    offload: Any = kind.offload
    if torch.get_default_device().type == "cpu":
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
        offload = Mock()

    def moving(self: Any, layer: int, only: bool = True) -> None:
        moved.append(layer)
        offload(self, layer, only)
        if torch.get_default_device().type == "cuda":
            torch.cuda.synchronize()  # transformers fetches back what may not have arrived yet

    monkeypatch.setattr(kind, "offload", moving)
    size = {"max_cache_len": 100} if kind is StaticCache else {}
    cache = kind(config=model.config.get_text_config(), offloading=True, **size)
    inputs = MADE.inputs(MADE.rows())
    want = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, **{CACHE: cache}), want)
    assert set(moved) == set(range(LAYERS))


def test_a_quantized_cache_is_refused(model, patched):
    cache = QuantizedCache.__new__(QuantizedCache)  # its packages are not needed for that
    Cache.__init__(cache, layers=[])
    with pytest.raises(UnsupportedError, match="StaticCache, got QuantizedCache"):
        model(**MADE.inputs(MADE.rows()), **{CACHE: cache})


@pytest.mark.skipif(not TOLD, reason="such caches are served here")
def test_a_static_cache_that_is_told_where_to_write_is_refused():
    model = MADE.model()  # which holds on to the cache that was refused
    apply_adsc(model, SCHEDULES[0])
    with pytest.raises(UnsupportedError, match="counts its own columns, got a StaticCache"):
        model.generate(**MADE.inputs(MADE.rows()), **GREEDY, cache_implementation="static")


def evict(layer: Any, share: int) -> None:
    layer.keys, layer.values = (x[:, :, ::share] for x in (layer.keys, layer.values))


@torch.no_grad()
@pytest.mark.parametrize("layers", [range(LAYERS), [0], [LAYERS - 1]], ids=str)
def test_a_cache_that_another_evicts_from_is_refused(model, patched, layers):
    cache = model(**MADE.inputs(MADE.rows()[:1])).past_key_values
    for number in layers:
        evict(cache.layers[number], 2)
    with pytest.raises(ValueError, match=r"expected layers that hold.*was something evicted"):
        model(input_ids=torch.tensor([[9]]), **{CACHE: cache})


@torch.no_grad()
def test_kvpress_and_a_schedule_on_one_model(model, patched):
    """Refused where it has evicted from a cache with pictures; without any, each does its own.

    kvpress takes a stage that is shorter than its call for a step of decoding, and evicts nothing.
    """
    kvpress = pytest.importorskip("kvpress")
    inputs, step = MADE.inputs(MADE.rows()[:1]), {"input_ids": torch.tensor([[9]])}
    plain = model(**inputs).past_key_values
    with kvpress.KnormPress(compression_ratio=0.5)(model):
        cache = DynamicCache()
        model(**inputs, **{CACHE: cache})
        if patched.schedule.boundaries[0].layer:
            assert lengths(cache) < lengths(plain)
            with pytest.raises(ValueError, match="was something evicted"):
                model(**step, **{CACHE: cache})
        else:
            assert lengths(cache) == lengths(plain)
            want = model(**step, **{CACHE: plain}).logits
            assert torch.equal(model(**step, **{CACHE: cache}).logits, want)
        text = DynamicCache()
        model(input_ids=torch.arange(10, 30)[None], **{CACHE: text})
        assert set(lengths(text)) == {10}
