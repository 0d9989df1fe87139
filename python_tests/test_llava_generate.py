"""How answers are drawn, streamed and ended."""

from __future__ import annotations

import pytest
import torch
from llava_case import IMAGES, PROMPTS
from tiny_checkpoints import make_checkpoint

from adsc_kernels.llava import Llava
from adsc_kernels.sampling import Inbox, choose

SCHEDULE = "1:1/2,2:1/3"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Llava:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, seed=2, layers=3)
    return Llava.from_pretrained(folder, SCHEDULE, device="cpu")


def with_stop_tokens(model: Llava, ids: tuple[int, ...]) -> Llava:
    from dataclasses import replace

    twin = model.with_schedule(model.schedule)
    twin.config = replace(model.config, stop_token_ids=ids)
    return twin


@pytest.mark.parametrize("late", [False, True])
def test_sequences_end_at_different_times(model, monkeypatch, late):
    monkeypatch.setattr(Inbox, "late", late)
    free = model.generate(PROMPTS, IMAGES, max_new_tokens=12)
    assert free.decode_steps == 11
    stop = free.token_ids[0][3]  # ends the first sequence after four tokens, and maybe others
    ended = with_stop_tokens(model, (stop,)).generate(PROMPTS, IMAGES, max_new_tokens=12)
    lengths = set()
    for got, want in zip(ended.token_ids, free.token_ids, strict=True):
        length = want.index(stop) + 1 if stop in want else len(want)
        assert got == want[:length]
        lengths.add(length)
    assert len(lengths) > 1
    everything = with_stop_tokens(model, tuple(range(48)))
    ended = everything.generate(PROMPTS, IMAGES, max_new_tokens=12)
    assert ended.token_ids == [ids[:1] for ids in free.token_ids]
    assert ended.decode_steps == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_conversation_goes_on_after_uneven_ends(model, monkeypatch, late):
    """Under a stop token, as without: a later turn continues what is there."""
    monkeypatch.setattr(Inbox, "late", late)
    free = model.generate(PROMPTS, IMAGES, max_new_tokens=6)
    stop = free.token_ids[1][2]
    ended = with_stop_tokens(model, (stop,)).generate(PROMPTS, IMAGES, max_new_tokens=6)
    talk = ended.conversation
    assert talk.cached == [len(tokens) - 1 for tokens in talk.tokens]
    assert talk.cache.stages[0].lens == tuple(talk.cached)
    turn = ["w30 w31"] * len(PROMPTS)
    together = model.generate(turn, max_new_tokens=4, conversation=talk).token_ids
    for b, (prompt, images) in enumerate(zip(PROMPTS, IMAGES, strict=True)):
        alone = with_stop_tokens(model, (stop,)).generate([prompt], [images], max_new_tokens=6)
        assert alone.token_ids == [ended.token_ids[b]]
        again = model.generate(turn[:1], max_new_tokens=4, conversation=alone.conversation)
        assert again.token_ids == [together[b]]


def test_streaming_gives_every_token_and_all_the_text(model):
    seen: list[list[int]] = [[] for _ in PROMPTS]
    text = ["" for _ in PROMPTS]

    def on_token(sequence: int, token: int, piece: str) -> None:
        seen[sequence].append(token)
        text[sequence] += piece

    answer = model.generate(PROMPTS, IMAGES, max_new_tokens=8, on_token=on_token)
    assert seen == answer.token_ids
    assert text == answer.texts
    assert all(text)


def test_characters_of_several_tokens_come_whole(model, monkeypatch):
    letters = {0: b"a", 1: b"\xc3", 2: b"\xa9"}

    def decode(ids: list[int]) -> str:
        return b"".join(letters[n % 3] for n in ids).decode(errors="replace")

    monkeypatch.setattr(model.processor, "decode", decode)
    chosen = iter(torch.tensor([[0], [1], [2], [0], [1]]))
    monkeypatch.setattr("adsc_kernels.llava.generate.choose", lambda *_: next(chosen))
    pieces = []
    answer = model.generate(
        ["w1"], max_new_tokens=5, on_token=lambda _b, _t, piece: pieces.append(piece)
    )
    assert pieces == ["a", "", "é", "a", ""]
    assert answer.texts == ["aéa\N{REPLACEMENT CHARACTER}"]


def test_stop_texts_end_an_answer_and_are_cut_off(model):
    free = model.generate(PROMPTS, IMAGES, max_new_tokens=8)
    words = free.texts[0].split()  # special tokens have no text
    end = f"{words[2]} {words[3]}"
    texts = [model.processor.decode(free.token_ids[0][:n]) for n in range(9)]
    length = next(n for n, text in enumerate(texts) if end in text)
    assert length < 8
    ended = model.generate(PROMPTS, IMAGES, max_new_tokens=8, stop=[end, "never"])
    assert ended.texts[0] == free.texts[0].partition(end)[0]
    assert ended.token_ids[0] == free.token_ids[0][:length]
    assert (
        ended.texts[0]
        == model.generate(PROMPTS[:1], IMAGES[:1], max_new_tokens=8, stop=end).texts[0]
    )


def test_sampling_follows_the_seed(model):
    options = {"max_new_tokens": 12, "temperature": 1.5}
    first = model.generate(PROMPTS, IMAGES, seed=1, **options).token_ids
    assert model.generate(PROMPTS, IMAGES, seed=1, **options).token_ids == first
    assert model.generate(PROMPTS, IMAGES, seed=2, **options).token_ids != first
    greedy = model.generate(PROMPTS, IMAGES, max_new_tokens=12).token_ids
    assert first != greedy
    nearly = model.generate(PROMPTS, IMAGES, temperature=1e-4, max_new_tokens=12, seed=3)
    assert nearly.token_ids == greedy
    top = model.generate(PROMPTS, IMAGES, temperature=5.0, top_p=1e-6, max_new_tokens=12, seed=3)
    assert top.token_ids == greedy


def test_sampling_draws_by_the_probabilities():
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rng = torch.Generator().manual_seed(0)
    logits = shares.log().expand(20000, -1)
    counts = choose(logits, 1.0, 1.0, rng).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, shares, atol=0.02, rtol=0)
    # 0.5 + 0.3 reach 0.7: the other two are out, and these are drawn in proportion.
    counts = choose(logits, 1.0, 0.7, rng).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0, 0]), atol=0.02, rtol=0)


def test_progress_bars_show_what_is_going_on(model, capsys):
    options = {"max_new_tokens": 2, "prefill_chunk": 5}
    model.generate(PROMPTS, IMAGES, progress=True, **options)
    err = capsys.readouterr().err
    assert all(name in err for name in ("pictures", "prefill", "tokens"))
    model.generate(PROMPTS, IMAGES, **options)
    assert capsys.readouterr().err == ""


def test_what_a_generation_tells(model):
    answer = model.generate(PROMPTS, IMAGES, max_new_tokens=3)
    assert answer.vision_spans == [
        (0, 3, 16, 4, 4),
        (1, 1, 16, 4, 4),
        (1, 19, 16, 4, 4),
        (3, 2, 16, 4, 4),
        (3, 18, 16, 4, 4),
    ]
    assert answer.plan.stages[0].seq_lens == (20, 38, 3, 36)
    assert answer.plan.stages[1].seq_lens == (12, 22, 3, 20)
    assert answer.plan.stages[2].seq_lens == (7, 12, 3, 10)
    assert min(answer.vision_seconds, answer.prefill_seconds, answer.decode_seconds) > 0
    assert answer.decode_steps == 2


def test_no_gradient_is_kept(model):
    answer = model.generate(PROMPTS, IMAGES, max_new_tokens=2)
    assert not any(t.requires_grad for s in answer.conversation.cache.stages for t in s.k)
