"""MACs and cache bytes: against the paper's setting, a profiler, and themselves."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from adsc_kernels.accounting import ModelShape, TowerShape, account, account_lengths
from adsc_kernels.schedule import CompressionSchedule

CLIP_L = TowerShape(24, 1024, 4096, 576, 3 * 14 * 14)
LLAVA_7B = ModelShape(32, 4096, 32, 32, 128, 11008, 32064, CLIP_L)
MEAN_192 = CompressionSchedule.parse("4:1/3,20:1/3", num_layers=32)  # (4*576+16*192+12*64)/32
DENSE = CompressionSchedule.dense(32)


def test_kv_bytes_of_llava_7b_at_an_average_of_192() -> None:
    dense = account(LLAVA_7B, DENSE, text_tokens=101, vision_tokens=576)
    kept = account(LLAVA_7B, MEAN_192, text_tokens=101, vision_tokens=576)
    assert dense.kv_bytes == 677 * 2**19  # half a MiB a token in 16 bits
    assert kept.kv_bytes == 293 * 2**19
    assert round(100 * (1 - kept.kv_bytes / dense.kv_bytes), 1) == 56.7
    assert [stage.rows for stage in kept.stages] == [677, 293, 165]


def test_macs_of_llava_7b() -> None:
    dense = account(LLAVA_7B, DENSE, text_tokens=101, vision_tokens=576)
    kept = account(LLAVA_7B, MEAN_192, text_tokens=101, vision_tokens=576)
    assert (dense.tower_macs + dense.projector_macs) / 1e12 == pytest.approx(0.203, abs=5e-4)
    # Causal scores, SwiGLU's three matrices, with the tower: 54.5 % by an earlier count.
    assert round(100 * (1 - kept.macs / dense.macs), 1) == 54.5
    assert round(100 * (1 - kept.decoder_macs / dense.decoder_macs), 1) in (56.9, 57.0, 57.1)


def test_counts_what_a_profiler_counts() -> None:
    text = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=70,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(text).eval()
    shape = ModelShape.from_config(text)
    length = 19
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64), logits_to_keep=1)
    counted = account(shape, CompressionSchedule.dense(3), text_tokens=length, vision_tokens=0)
    full_scores = 3 * 2 * length**2 * 48  # a masked matrix product is paid in full by eager code
    scores = sum(stage.score_macs for stage in counted.stages)
    assert counted.macs - scores + full_scores == counter.get_total_flops() // 2


def test_tower_and_projector_count_what_a_profiler_counts() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
    )
    text = transformers.LlamaConfig(hidden_size=40, num_attention_heads=4)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    shape = ModelShape.from_config(config)
    vision._attn_implementation = "eager"  # the profiler has no rule for the fused one on CPU
    tower = transformers.CLIPVisionModel(vision).eval()
    projector = torch.nn.Sequential(torch.nn.Linear(32, 40), torch.nn.Linear(40, 40))
    assert shape.tower is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        states = tower(torch.zeros(1, 3, 48, 48)).last_hidden_state
    assert shape.tower.macs() == counter.get_total_flops() // 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        projector(states[:, 1:])
    assert shape.projector_macs() == counter.get_total_flops() // 2


def test_a_batch_costs_what_its_sequences_cost() -> None:
    lengths = [(677, 90, 700), (293, 90, 316), (165, 90, 188)]
    batch = account_lengths(LLAVA_7B, MEAN_192, lengths, num_images=2, decode_tokens=5)
    alone = [
        account_lengths(LLAVA_7B, MEAN_192, [(n,) for n in own], num_images=i, decode_tokens=5)
        for own, i in zip(zip(*lengths, strict=True), (1, 0, 1), strict=True)
    ]
    assert batch.macs == sum(a.macs for a in alone)
    assert batch.kv_bytes == sum(a.kv_bytes for a in alone)


def test_decoding_is_prefill_one_token_at_a_time() -> None:
    longer = account(LLAVA_7B, DENSE, text_tokens=30, vision_tokens=0)
    stepwise = account(LLAVA_7B, DENSE, text_tokens=20, vision_tokens=0, decode_tokens=10)
    assert stepwise.decoder_macs == longer.decoder_macs
    assert stepwise.kv_bytes == longer.kv_bytes
    assert stepwise.head_macs == 11 * longer.head_macs  # every step reads the head


def test_grid_needs_its_sides() -> None:
    grid = CompressionSchedule.parse("16:1/2x1/2@grid", num_layers=32)
    counted = account(LLAVA_7B, grid, text_tokens=0, vision_tokens=576, grid=(24, 24))
    assert counted.stages[1].rows == 144
    with pytest.raises(ValueError, match="height"):
        account(LLAVA_7B, grid, text_tokens=0, vision_tokens=576)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_tokens": -1}, "text_tokens"),
        ({"vision_tokens": -1}, "vision_tokens"),
        ({"decode_tokens": -1}, "decode_tokens"),
        ({"element_bytes": 0}, "element_bytes"),
        ({"convention": "flops"}, "convention"),
        ({"schedule": CompressionSchedule.dense(16)}, "32 layers, got 16"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"schedule": MEAN_192, "text_tokens": 101, "vision_tokens": 576}
    with pytest.raises(ValueError, match=message):
        account(LLAVA_7B, **{**good, **change})


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        ModelShape(1, 8, 0, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="gpt2"):
        ModelShape.from_config(transformers.GPT2Config())
    with pytest.raises(ValueError, match="3 stages, got 1"):
        account_lengths(LLAVA_7B, MEAN_192, [(677,)], num_images=1)
