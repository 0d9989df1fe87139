"""Prefix-cache hits: as far as the dense model's, and answers that stay the oracle's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import BLOCK, Ask, answer, assert_pool_free, check, engine, words
from PIL import Image
from vllm import SamplingParams

import adsc_kernels
from adsc_kernels.integrations.vllm import layout
from adsc_kernels.integrations.vllm.manager import AdscStageManager

SCHEDULES = ("2:1/2,4:1/2", "2:1/3,4:1/2", "2:1/64,4:1", "3:0", "2:1/2x1/4,4:1/2x1@grid")

# One image with different text before and behind it, other images with the same, text alone.
SHARING = (
    Ask(f"{words(5, 40)} <image> {words(9, 80)}", (2,)),
    Ask(f"{words(5, 40)} <image> {words(9, 60)} {words(30, 9)}", (2,)),
    Ask(f"{words(5, 40)} <image> {words(9, 80)}", (3,)),
    Ask(f"<image> {words(3, 80)}", (2,)),
    Ask(f"<image> {words(20, 80)}", (2,)),
    Ask(words(5, 100)),
)


LONG = Ask(words(5, 170))


def hits(llm, llava, schedule: str) -> list[int]:
    """Cached tokens of each prompt, asked one by one, each twice; with the right answers."""
    made = []
    for ask in (*SHARING, *SHARING, LONG, LONG):
        outputs = answer(llm, [ask], 3)
        check(llava, schedule, [ask], outputs)
        made.append(outputs[0].num_cached_tokens)
    return made


@pytest.fixture(scope="module")
def dense_hits(llava):
    with engine(llava, "", enable_prefix_caching=True) as llm:
        return hits(llm, llava, "")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hits_and_answers(llava, dense_hits, schedule):
    """Hits before, in and behind images, where the dense model's end; another image or another
    question behind it."""
    assert max(dense_hits) > 128
    with engine(llava, schedule, enable_prefix_caching=True) as llm:
        assert hits(llm, llava, schedule) == dense_hits
        # All at once, some of them to be copied from while they go on.
        check(llava, schedule, SHARING, answer(llm, SHARING, 40))
        assert_pool_free(llm)


def wrong(llava, ask) -> bool:
    with engine(llava, SCHEDULES[0], enable_prefix_caching=True) as llm:
        try:
            ask(llm)
        except AssertionError:
            return True
    return False


CHAT = [Ask(f"{words(5, 40)} <image> {words(n, 60)}", (2,)) for n in (9, 9, 30)]


def one_by_one(llm, llava) -> None:
    for ask in CHAT:
        check(llava, SCHEDULES[0], [ask], answer(llm, [ask], 6))


def test_a_row_too_far(llava, monkeypatch):
    """A copied tail's rows are those before the hit: not one further."""
    from vllm.v1.worker import gpu_model_runner

    copy, copies = gpu_model_runner.copy_kv_cache_blocks_inplace, []

    def moved_by_a_row(caches, num_blocks, pairs):
        copy(caches, num_blocks, pairs)
        copies.extend(pairs)
        for cache in caches:
            rows = cache.shape.index(BLOCK, 1)
            for pair in pairs:
                block = cache[pair.dst_block_id]
                block.copy_(block.roll(1, rows - 1).clone())

    assert not wrong(llava, lambda llm: one_by_one(llm, llava))
    monkeypatch.setattr(gpu_model_runner, "copy_kv_cache_blocks_inplace", moved_by_a_row)
    assert wrong(llava, lambda llm: one_by_one(llm, llava))
    assert copies


def test_key_by_survivors_index(llava, monkeypatch):
    """A stage's block j under the hash of the prompt's block j, in front of what it holds."""
    cache_blocks = AdscStageManager.cache_blocks

    def by_index(self, request, num_tokens, *args, **kwargs):
        hashes, block = request.block_hashes, self.block_size
        kept = [self._kept(request.request_id, (i + 1) * block) for i in range(len(hashes))]
        keys = [hashes[max(n // block - 1, 0)] for n in kept]
        known = SimpleNamespace(request_id=request.request_id, block_hashes=keys)
        cache_blocks(self, known, num_tokens, *args, **kwargs)

    def all_of_them(llm):
        for ask in (*SHARING, *SHARING):
            check(llava, SCHEDULES[0], [ask], answer(llm, [ask], 6))

    monkeypatch.setattr(AdscStageManager, "cache_blocks", by_index)
    monkeypatch.setattr(layout.RequestLayout, "position_of", lambda self, stage, index: index)
    assert wrong(llava, all_of_them)


DIGITS = Path(adsc_kernels.__file__).parent / "checkpoints" / "tiny-llava-digits"


def chats() -> list[list[tuple[str, list[Image.Image]]]]:
    """The usual ones, each the prompts of its turns: a second question on a picture, and a new
    picture each turn; with and without text in front."""
    folder = DIGITS / "pictures"
    names = sorted(json.loads((folder / "questions.json").read_text()))
    pictures = [Image.open(folder / name) for name in names[:3]]
    made = []
    for front in ("", "You are a careful reader of digits. " * 8):
        one = f"{front}USER: <image>\nRead row 1. ASSISTANT:"
        other = f"{front}USER: <image>\nHow many 3s are there? ASSISTANT:"
        made.append([(one, pictures[:1]), (other, pictures[:1])])
        turn = "USER: <image>\nRead row 1. ASSISTANT: 1 2 3 4 "
        made.append([(front + turn * n, pictures[:n]) for n in (1, 2, 3)])
    return made


def cached_tokens(schedule: str) -> list[list[int]]:
    """Of each turn of each chat; the answer is the one without a hit."""
    options = dict(max_model_len=2048, max_num_batched_tokens=2048, num_gpu_blocks_override=400)
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    results = []
    with engine(
        SimpleNamespace(folder=DIGITS), schedule, enable_prefix_caching=True, **options
    ) as llm:
        for chat in chats():
            assert llm.reset_prefix_cache()
            results.append([])
            for prompt, images in chat:
                request = {"prompt": prompt, "multi_modal_data": {"image": images}}
                [output] = llm.generate([request], greedy, use_tqdm=False)
                hit, tokens = output.num_cached_tokens, output.outputs[0].token_ids
                results[-1].append(hit)
                if hit:
                    assert llm.reset_prefix_cache()
                    [output] = llm.generate([request], greedy, use_tqdm=False)
                    assert output.outputs[0].token_ids == tokens
    return results


def test_chats():
    """As far as the dense model's, and the answers without a hit."""
    dense, staged = cached_tokens(""), cached_tokens("4:1/4,8:1/4,12:1/4")
    assert staged == dense
    assert all(chat[-1] >= 576 for chat in dense)
