"""MACs and bytes: against the paper's setting, a profiler, real models' sizes, and themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from cache_name import CACHE
from llava_case import IMAGES, PROMPTS
from model_configs import IMAGE, model_of, small
from tiny_checkpoints import make_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adsc_kernels.accounting import (
    CONVENTIONS,
    KV_BITS,
    MODELS,
    CacheFormat,
    Convention,
    ModelShape,
    Parts,
    account,
    account_lengths,
)
from adsc_kernels.llava import Llava
from adsc_kernels.schedule import CompressionSchedule

LLAVA_7B = ModelShape.preset("llava-1.5-7b")
MEAN_192 = CompressionSchedule.parse("4:1/3,20:1/3", num_layers=32)  # (4*576+16*192+12*64)/32
DENSE = CompressionSchedule.dense(32)
SMALL = small()


def cut(dense: int, kept: int) -> float:
    return 100 * (1 - kept / dense)


# Against transformers' models and torch's profiler.


def picture_inputs(name: str, config) -> tuple[dict, dict]:
    """A prompt with pictures for the model, and the same as arguments of `account`."""
    if not hasattr(config, "vision_config"):
        return {"input_ids": torch.ones(1, 19, dtype=torch.int64)}, {"vision_tokens": 0}
    if name == "qwen2.5-vl":
        down, across = 5, 7  # windows of 4 x 4 rows leave ragged ones
        sizes = torch.tensor([[1, 2 * down, 2 * across]])
        pixels = torch.zeros(4 * down * across, 3 * 2 * 8**2)
        return {"pixel_values": pixels, "image_grid_thw": sizes}, {"grid": (down, across)}
    if name in ("llava-next", "onevision"):  # a base view and two crops, with newlines
        config.image_grid_pinpoints = [[48, 96], [96, 48]]
        return (
            {"pixel_values": torch.zeros(1, 3, 3, 48, 48), "image_sizes": torch.tensor([[48, 96]])},
            {"vision_tokens": 36 + 6 * (12 + 1), "tiles": 3},
        )
    return {"pixel_values": torch.zeros(1, 3, 48, 48)}, {}


@pytest.mark.parametrize("name", SMALL)
def test_counts_what_a_profiler_counts_and_a_model_holds(name: str) -> None:
    inputs, options = picture_inputs(name, SMALL[name])
    model = model_of(SMALL[name]).eval()
    shape = ModelShape.from_config(SMALL[name])
    dense = CompressionSchedule.dense(shape.num_layers)
    vision = account(shape, dense, 10, **options).vision_tokens[0]
    inputs.setdefault("input_ids", torch.tensor([[1] * 5 + [IMAGE] * vision + [2] * 4]))
    if name == "qwen2.5-vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    text = inputs["input_ids"].shape[1] - vision
    options |= {"kv_dtype": "float32", "weight_bytes": 4, "convention": "profiler"}
    counted = account(shape, dense, text, **options)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(**inputs, use_cache=True)
    assert counted.macs == counter.get_total_flops() // 2
    assert counted.weight_bytes.total == sum(p.nbytes for p in model.parameters())
    layers = getattr(out, CACHE).layers
    assert [layer.kv_bytes for layer in counted.layers] == [
        layer.keys.nbytes + layer.values.nbytes for layer in layers
    ]
    # One more token through the same cache.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        token = torch.ones(1, 1, dtype=torch.int64)
        model(input_ids=token, **{CACHE: getattr(out, CACHE)}, use_cache=True)
    longer = account(shape, dense, text, decode_tokens=1, **options)
    assert longer.decode.total == counter.get_total_flops() // 2
    assert longer.prefill == counted.prefill
    assert longer.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def test_parts_are_what_a_profiler_counts_in_each_module() -> None:
    inputs, _ = picture_inputs("llava", SMALL["llava"])
    model = model_of(SMALL["llava"]).eval()
    inputs["input_ids"] = torch.tensor([[1] * 5 + [IMAGE] * 36 + [2] * 4])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    flops = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}

    def profiled(*ends: str) -> int:
        return sum(macs for name, macs in flops.items() if name.endswith(ends))

    shape = ModelShape.from_config(SMALL["llava"])
    counted = account(shape, CompressionSchedule.dense(3), 9, convention="profiler").prefill
    language = [n for n in flops if ".language_model.layers." in n]
    attention = sum(flops[n] for n in language if n.endswith("self_attn"))
    projections = sum(flops[n] for n in language if n.endswith("_proj") and "self_attn" in n)
    assert counted.projections == projections
    assert counted.scores == attention - projections
    assert counted.ffn == sum(flops[n] for n in language if n.endswith(".mlp"))
    assert counted.head == profiled(".lm_head")
    assert counted.tower == profiled(".vision_tower")
    assert counted.projector == profiled(".multi_modal_projector")


@pytest.mark.parametrize("schedule", ["", "1:1/2,2:1/3", "0:1/4,3:1/2@linspace", "2:1/2x1/2@grid"])
@pytest.mark.parametrize(("kv_heads", "early"), [(4, False), (2, False), (2, True)])
def test_the_thin_model_compressed(
    tmp_path: Path, schedule: str, kv_heads: int, early: bool
) -> None:
    """A ragged batch, its prompt and its decoded tokens: to the MAC and to the byte."""
    make_checkpoint(tmp_path, kv_heads=kv_heads)
    model = Llava.from_pretrained(tmp_path, schedule, device="cpu")
    model.vision_tower.set_attn_implementation("eager")
    new = 4  # of which the last one is not run
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        done = model.generate(PROMPTS, IMAGES, max_new_tokens=new, compact_early_layers=early)
    lengths = [stage.seq_lens for stage in done.plan.stages]
    options = {
        "tiles": sum(map(len, IMAGES)),
        "kv_dtype": "float32",
        "convention": replace(CONVENTIONS["exact"], scores="full"),
        "compact_to": 1 if early and schedule else None,
    }
    shape = ModelShape.from_config(model.config)
    prompt = account_lengths(shape, model.schedule, lengths, **options)
    whole = account_lengths(shape, model.schedule, lengths, decode_tokens=new - 1, **options)
    # What no convention counts: rows that a boundary drops are spared the rest of the layer before.
    rows = [sum(lens) for lens in lengths]
    dropped = sum(
        rows[s] - rows[s + 1]
        for s in range(len(rows) - 1)
        if len(model.schedule.layers_of_stage(s))
    )
    each = shape.num_heads * shape.head_dim + 3 * shape.intermediate_size
    spared = dropped * shape.hidden_size * each
    assert whole.macs - spared == counter.get_total_flops() // 2
    assert tuple(stage.kv_bytes for stage in prompt.stages) == done.cache_bytes_per_stage
    cache = done.conversation.cache
    assert tuple(stage.kv_bytes for stage in whole.stages) == cache.bytes_per_stage
    for stage, counted in zip(cache.stages, whole.stages, strict=True):
        assert list(stage.layers) == list(counted.layers)
        for k, v in zip(stage.k, stage.v, strict=True):
            assert k.nbytes + v.nbytes == counted.layer.kv_bytes


@pytest.mark.parametrize("name", MODELS)
def test_presets_are_what_their_config_gives(name: str) -> None:
    """Configs as they are on the hub, as far as sizes go."""
    from model_configs import published

    assert ModelShape.preset(name) == ModelShape.from_config(published(name))


def test_presets_hold_as_many_parameters_as_their_names_say() -> None:
    billions = {
        name: account(
            shape,
            CompressionSchedule.dense(shape.num_layers),
            1,
            vision_tokens=0,
            weight_bytes=1,
        ).weight_bytes.total
        / 1e9
        for name, shape in MODELS.items()
    }
    assert billions == pytest.approx(
        {
            "llava-1.5-7b": 7.063,
            "llava-1.5-13b": 13.351,
            "llava-next-vicuna-7b": 7.063,
            "llava-next-vicuna-13b": 13.351,
            "llava-next-mistral-7b": 7.567,
            "llava-onevision-7b": 8.031,
            "qwen2.5-vl-3b": 3.755,
            "qwen2.5-vl-7b": 8.292,
            "internvl3-8b": 7.944,
            "internvl3-14b": 15.117,
        },
        abs=5e-4,
    )


# The paper's setting, and what follows from the definitions.


def test_kv_bytes_of_llava_7b_at_an_average_of_192() -> None:
    dense = account(LLAVA_7B, DENSE, text_tokens=101)
    kept = account(LLAVA_7B, MEAN_192, text_tokens=101)
    assert dense.kv_bytes == 677 * 2**19  # half a MiB a token in 16 bits
    assert kept.kv_bytes == 293 * 2**19
    assert cut(dense.kv_bytes, kept.kv_bytes) == pytest.approx(56.72, abs=5e-3)
    assert [stage.rows for stage in kept.stages] == [677, 293, 165]
    assert (kept.average_processed, kept.average_post_drop) == (
        192,
        (3 * 576 + 16 * 192 + 832) / 32,
    )


def test_macs_of_llava_7b() -> None:
    dense = account(LLAVA_7B, DENSE, text_tokens=101)
    kept = account(LLAVA_7B, MEAN_192, text_tokens=101)
    assert (dense.prefill.tower + dense.prefill.projector) / 1e12 == pytest.approx(0.2030, abs=5e-5)
    assert account(LLAVA_7B, DENSE, 101, convention="full-3").macs / 1e12 == pytest.approx(
        4.504, abs=5e-4
    )
    assert cut(dense.macs, kept.macs) == pytest.approx(54.49, abs=5e-3)
    assert cut(dense.decoder_macs, kept.decoder_macs) == pytest.approx(56.98, abs=5e-3)


def test_pyramiddrops_published_macs() -> None:
    pyramid = CompressionSchedule.parse("8:1/2,16:1/2,24:1/2", num_layers=32)
    macs = [
        account(LLAVA_7B, schedule, text_tokens=101, convention="vision-only").macs / 1e12
        for schedule in (DENSE, pyramid)
    ]
    assert macs == pytest.approx([3.817, 1.777], abs=5e-4)
    assert account(LLAVA_7B, pyramid, 101).average_processed == 270


def test_conventions_by_hand() -> None:
    """One layer of one head, sizes that tell every product apart."""
    shape = ModelShape(1, 3, 2, 1, 5, 7, 11)
    n, d, m, q, kv = 4, 3, 7, 10, 5
    one = CompressionSchedule.dense(1)
    projections = n * d * 2 * (q + kv)
    scores = {"causal": n * (n + 1) * q, "full": 2 * n * n * q, "halved": n * n * q, "none": 0}
    for how in CONVENTIONS.values():
        rows = n if how.text else 0
        counted = account(shape, one, text_tokens=n, vision_tokens=0, convention=how)
        assert counted.prefill == Parts(
            projections=projections * bool(rows),
            scores=scores[how.scores] * bool(rows),
            ffn=rows * d * m * (how.ffn_matrices or 3),
            norms=rows * 2 * d * 2 * how.norms,
            head={"none": 0, "last": 1, "all": n}[how.head] * d * (11 + 2 * how.norms),
        )
        assert how.definition and "\n" not in how.definition


def test_norms_of_queries_and_keys_count() -> None:
    plain = ModelShape(1, 3, 2, 1, 5, 7, 11)
    normed = replace(plain, qk_norm=True)
    macs = [
        account(shape, CompressionSchedule.dense(1), 4, 0, convention="everything").prefill.norms
        for shape in (plain, normed)
    ]
    assert macs[1] - macs[0] == 4 * 2 * (10 + 5)


def test_a_batch_costs_what_its_sequences_cost() -> None:
    lengths = [(677, 90, 700), (293, 90, 316), (165, 90, 188)]
    options = {"decode_tokens": 5, "block_size": 16, "compact_to": 1}
    batch = account_lengths(LLAVA_7B, MEAN_192, lengths, tiles=2, **options)
    alone = [
        account_lengths(LLAVA_7B, MEAN_192, [(n,) for n in own], tiles=i, **options)
        for own, i in zip(zip(*lengths, strict=True), (1, 0, 1), strict=True)
    ]
    assert batch.macs == sum(a.macs for a in alone)
    assert batch.kv_bytes == sum(a.kv_bytes for a in alone)
    assert batch.kv_prompt_bytes == sum(a.kv_prompt_bytes for a in alone)


def test_decoding_is_prefill_one_token_at_a_time() -> None:
    longer = account(LLAVA_7B, DENSE, text_tokens=30, vision_tokens=0)
    stepwise = account(LLAVA_7B, DENSE, text_tokens=20, vision_tokens=0, decode_tokens=10)
    assert stepwise.decoder_macs == longer.decoder_macs
    assert stepwise.kv_bytes == longer.kv_bytes
    assert stepwise.prefill.head == longer.prefill.head
    assert stepwise.decode.head == 10 * longer.prefill.head  # every step reads the head


def test_layers_stages_and_totals_agree() -> None:
    counted = account(LLAVA_7B, MEAN_192, 101, decode_tokens=3, convention="everything")
    assert len(counted.layers) == 32
    assert sum(layer.macs for layer in counted.layers) == counted.decoder_macs
    assert sum(stage.macs for stage in counted.stages) == counted.decoder_macs
    assert sum(layer.kv_bytes for layer in counted.layers) == counted.kv_bytes
    assert counted.prefill.total + counted.decode.total == counted.macs
    outside = counted.outside_prefill.total + counted.outside_decode.total
    assert counted.macs == counted.decoder_macs + outside


@pytest.mark.parametrize("dtype", KV_BITS)
def test_bytes_by_dtype(dtype: str) -> None:
    kept = account(LLAVA_7B, MEAN_192, 101, kv_dtype=dtype)
    assert kept.kv_bytes == 293 * 2**19 * KV_BITS[dtype] // 16
    scaled = account(LLAVA_7B, MEAN_192, 101, kv_dtype=dtype, kv_scale_bytes=4)
    assert scaled.kv_bytes - kept.kv_bytes == 293 * 32 * 2 * 32 * 4


def test_odd_heads_in_four_bits_start_at_whole_bytes() -> None:
    assert CacheFormat("int4").row_bytes(ModelShape(1, 8, 2, 1, 5, 8, 8)) == 2 * 3


def test_blocks_round_up_each_sequence_in_each_layer() -> None:
    lengths = [(17, 16, 0), (9, 16, 0)]
    schedule = CompressionSchedule.parse("3:1/2", num_layers=32)
    counted = account_lengths(LLAVA_7B, schedule, lengths, tiles=0, block_size=16)
    row = 2 * 32 * 128 * 2
    assert [layer.kv_bytes for layer in counted.layers] == [3 * 48 * row // 3] * 3 + [32 * row] * 29
    assert account_lengths(LLAVA_7B, schedule, lengths, tiles=0).kv_bytes == row * (99 + 25 * 29)


def test_early_layers_compacted_after_the_prompt() -> None:
    row = 2 * 32 * 128 * 2
    plain = account(LLAVA_7B, MEAN_192, 101, decode_tokens=8)
    assert plain.kv_peak_bytes == plain.kv_bytes == (293 + 8) * 32 * row
    last = account(LLAVA_7B, MEAN_192, 101, decode_tokens=8, compact_to=2)
    assert last.kv_bytes == (101 + 64 + 8) * 32 * row
    assert last.kv_peak_bytes == last.kv_prompt_bytes == 293 * 32 * row
    assert last.prefill == plain.prefill
    # Each of the 8 tokens sees so many keys fewer in the early layers.
    fewer = 4 * (576 - 64) + 16 * (192 - 64)
    assert plain.decode.scores - last.decode.scores == 8 * fewer * 2 * 4096
    middle = account(LLAVA_7B, MEAN_192, 101, compact_to=1)
    assert middle.kv_bytes == ((101 + 192) * 20 + (101 + 64) * 12) * row
    assert account(LLAVA_7B, MEAN_192, 101, compact_to=0).kv_bytes == 293 * 32 * row
    grown = account(LLAVA_7B, MEAN_192, 101, decode_tokens=500, compact_to=2)
    assert grown.kv_peak_bytes == grown.kv_bytes > grown.kv_prompt_bytes


def test_averages_of_both_kinds() -> None:
    # SparseVLM's layers 2, 6 and 15 run in full, and their output is cut.
    text = "3:300/576,7:200/300,16:110/200"
    sparse = CompressionSchedule.parse(text, num_layers=32)
    counted = account(LLAVA_7B, sparse, 101)
    assert counted.vision_tokens == (576, 300, 200, 110)
    assert counted.average_processed == (3 * 576 + 4 * 300 + 9 * 200 + 16 * 110) / 32
    assert counted.average_post_drop == (2 * 576 + 4 * 300 + 9 * 200 + 17 * 110) / 32
    before_any_layer = CompressionSchedule.parse("0:1/3", num_layers=32)
    counted = account(LLAVA_7B, before_any_layer, 101)
    assert counted.average_processed == counted.average_post_drop == 192
    assert account_lengths(LLAVA_7B, DENSE, [(9,)], tiles=0).average_processed is None


def test_grid_needs_its_sides() -> None:
    grid = CompressionSchedule.parse("16:1/2x1/2@grid", num_layers=32)
    counted = account(LLAVA_7B, grid, text_tokens=0, grid=(24, 24))
    assert counted.stages[1].rows == 144
    with pytest.raises(ValueError, match="height"):
        account(LLAVA_7B, grid, text_tokens=0, vision_tokens=576)
    qwen = ModelShape.preset("qwen2.5-vl-7b")
    dense = CompressionSchedule.dense(28)
    with pytest.raises(ValueError, match="vision_tokens"):
        account(qwen, dense, 10)
    with pytest.raises(ValueError, match="grid"):
        account(qwen, dense, 10, vision_tokens=100)
    assert account(qwen, dense, 10, vision_tokens=100, convention="decoder").macs > 0


def test_tiles_of_next() -> None:
    one, five = (account(LLAVA_7B, DENSE, 50, tiles=tiles) for tiles in (1, 5))
    assert five.vision_tokens == (2880,)
    assert five.prefill.tower == 5 * one.prefill.tower
    assert account(LLAVA_7B, DENSE, 50, vision_tokens=0).prefill.tower == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_tokens": -1}, "text_tokens: expected at least 0, got -1"),
        ({"vision_tokens": -1}, "vision_tokens"),
        ({"text_tokens": 0, "vision_tokens": 0}, "tokens: expected at least 1"),
        ({"decode_tokens": -1}, "decode_tokens"),
        ({"tiles": -1}, "tiles"),
        ({"grid": (0, 24)}, "grid_height"),
        ({"grid": (23, 24)}, "grid: expected 576"),
        ({"kv_dtype": "int3"}, "kv_dtype: expected one of .*'int4'.*, got 'int3'"),
        ({"kv_scale_bytes": -1}, "scale_bytes"),
        ({"block_size": 0}, "block_size"),
        ({"weight_bytes": 0}, "weight_bytes"),
        ({"compact_to": -1}, "compact_to"),
        ({"compact_to": 3}, "compact_to: expected a stage in 0..2, got 3"),
        ({"convention": "flops"}, "convention: expected one of .*'exact'"),
        ({"schedule": CompressionSchedule.dense(16)}, "32 layers, got 16"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"schedule": MEAN_192, "text_tokens": 101, "vision_tokens": 576}
    with pytest.raises(ValueError, match=message):
        account(LLAVA_7B, **{**good, **change})


def test_bad_types() -> None:
    with pytest.raises(TypeError, match="text_tokens: expected an int"):
        account(LLAVA_7B, DENSE, text_tokens=1.5)


def test_bad_lengths() -> None:
    with pytest.raises(ValueError, match="3 stages, got 1"):
        account_lengths(LLAVA_7B, MEAN_192, [(677,)], tiles=1)
    with pytest.raises(ValueError, match="2 sequences, got 1"):
        account_lengths(LLAVA_7B, MEAN_192, [(6, 7), (6, 7), (6,)], tiles=1)
    with pytest.raises(ValueError, match="seq_lens"):
        account_lengths(LLAVA_7B, DENSE, [(-1,)], tiles=1)
    with pytest.raises(ValueError, match="counts text"):
        account_lengths(LLAVA_7B, DENSE, [(1,)], tiles=1, convention="vision-only")


def test_bad_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_heads"):
        ModelShape(1, 8, 0, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor"):
        ModelShape(1, 8, 4, 3, 8, 8, 8)
    with pytest.raises(ValueError, match=r"expected a decoder of type llama.*gpt2"):
        ModelShape.from_config(transformers.GPT2Config())
    with pytest.raises(ValueError, match=r"expected a vision tower of type .*vit"):
        ModelShape.from_config(transformers.LlavaConfig(vision_config=transformers.ViTConfig()))
    with pytest.raises(ValueError, match="sliding windows"):
        ModelShape.from_config(transformers.MistralConfig(sliding_window=4096))
    with pytest.raises(ValueError, match=r"model: expected one of 'llava-1.5-7b', .*'llava'"):
        ModelShape.preset("llava")
    with pytest.raises(FileNotFoundError, match=r"a folder with a config.json"):
        ModelShape.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="scores: expected one of"):
        Convention("mine", "", "some")


def test_from_a_folder(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    shape = ModelShape.from_pretrained(tmp_path)
    assert shape == ModelShape.from_config(Llava.from_pretrained(tmp_path, device="cpu").config)
