"""Qwen3-VL: norms of queries and keys, what its tower adds to the first layers, and the times that
it writes between the frames of a video; against the oracle."""

from __future__ import annotations

import pytest
from engines import Checkpoint, assert_pool_free, drawn
from test_qwen2_5_vl import PADS, TOKEN, VOCAB, answer_and_check, qwen_engine, save_processor
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

ARCHITECTURE = {"architectures": ["AdscQwen3VLForConditionalGeneration"]}
LEVELS = 2  # of layers that the tower adds to


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl")
    rope = dict(
        rope_type="default", rope_theta=1e4, mrope_section=[6, 5, 5], mrope_interleaved=True
    )
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(VOCAB) + 4,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=2048,
            rope_parameters=rope,
            bos_token_id=VOCAB["<s>"],
            eos_token_id=None,
        ),
        vision_config=dict(
            depth=LEVELS + 1,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            patch_size=TOKEN // 2,
            out_hidden_size=64,
            num_position_embeddings=64,
            deepstack_visual_indexes=list(range(LEVELS)),
        ),
        image_token_id=VOCAB[PADS["image"]],
        video_token_id=VOCAB[PADS["video"]],
        vision_start_token_id=VOCAB["<|vision_start|>"],
        vision_end_token_id=VOCAB["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    hf = drawn(Qwen3VLForConditionalGeneration, config, seed=3, std=0.15)
    hf.save_pretrained(folder)
    save_processor(folder, "Qwen3VLVideoProcessor", "Qwen3VLProcessor")
    return Checkpoint(folder, hf.double(), AutoProcessor.from_pretrained(folder))


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("2:1/2x1/3,4:1x1/2@grid", {}),
        # Chunks that cut images, and hits behind one.
        (
            "3:1/2,4:1/2",
            dict(enable_prefix_caching=True, max_num_batched_tokens=50, max_num_seqs=4),
        ),
    ],
)
def test_answers(qwen3, schedule, options):
    with qwen_engine(qwen3, schedule, hf_overrides=ARCHITECTURE, **options) as llm:
        first = answer_and_check(llm, qwen3, schedule)
        again = answer_and_check(llm, qwen3, schedule)
        assert (max(first), max(again)) == (0, 160) if options else (0, 0)
        assert_pool_free(llm)


def test_boundary_among_the_first_layers(qwen3):
    with (
        pytest.raises(ValueError, match="a boundary before layer 2: images enter the layers"),
        qwen_engine(qwen3, "1:1/2", hf_overrides=ARCHITECTURE),
    ):
        pass
