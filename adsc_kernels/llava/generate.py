"""Answering prompts: prefill (whole or in chunks), then token by token, turn after turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from ..cache import KVCache
from ..plan import CompressionPlan, make_plan
from .decoder import Phase

if TYPE_CHECKING:
    from .model import Llava

VisionSpan = tuple[int, int, int, int, int]  # sequence, start, length, height, width
IMAGES_AT_ONCE = 16  # through the tower: bounds its memory


@dataclass
class Conversation:
    """A batch of conversations so far. The token generated last is yet to be run, by a later turn."""

    tokens: list[list[int]]  # with every picture expanded to its rows
    vision_spans: list[VisionSpan]
    cached: list[int]  # how many of each sequence's tokens have been run
    cache: KVCache


@dataclass
class Generation:
    """What `generate` returns; the first token counts as prefill in times and steps.

    `cache_bytes` is what the K and V that the prefill filled take up: the sizes of their storages,
    before room for generated tokens is added.
    """

    texts: list[str]
    token_ids: list[list[int]]
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    cache_bytes_per_stage: tuple[int, ...]
    plan: CompressionPlan  # of the conversation with this turn's prompts, as if run at once
    conversation: Conversation  # for a later turn

    @property
    def cache_bytes(self) -> int:
        """Over all stages."""
        return sum(self.cache_bytes_per_stage)

    @property
    def vision_spans(self) -> list[VisionSpan]:
        """Every picture's (sequence, start, length, height, width)."""
        return self.conversation.vision_spans


@torch.no_grad()
def generate(
    model: Llava,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image]] | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] | None = None,
    prefill_chunk: int | None = None,
    on_token: Callable[[int, int, str], None] | None = None,
    progress: bool = False,
    conversation: Conversation | None = None,
) -> Generation:
    """Answer a batch of prompts.

    prompts: a text for each sequence, with `<image>` where a picture goes.
    images: the pictures of each prompt, in order; None where there are none at all.
    temperature: 0 takes the likeliest token; above 0 samples, by `top_p` and `seed` (None: new).
    stop: texts that end an answer and are cut off it, beside the checkpoint's stop tokens.
    prefill_chunk: run prompts in parts of so many tokens, which bounds the memory they take.
    on_token: called with (sequence, token id, piece of text) for each token; the piece is empty
      until its characters are whole.
    conversation: an earlier `Generation.conversation` to go on with: prompts are its next turn.

    Raises ValueError or TypeError for bad input, before anything is run or changed.
    """
    if max_new_tokens < 1 or (prefill_chunk is not None and prefill_chunk < 1):
        got = f"{max_new_tokens} and {prefill_chunk}"
        raise ValueError(f"max_new_tokens, prefill_chunk: expected at least 1, got {got}")
    if temperature < 0 or not 0 < top_p <= 1:
        got = f"{temperature} and {top_p}"
        raise ValueError(f"temperature, top_p: expected at least 0 and in (0, 1], got {got}")
    talk, pixels, new = read_turn(model, prompts, images, max_new_tokens, conversation)
    generator = torch.Generator(model.device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    stop = [stop] if isinstance(stop, str) else stop or ()
    lengths = [len(tokens) for tokens in talk.tokens]
    plan = make_plan(model.schedule, _offsets(lengths), talk.vision_spans, model.device)

    times = [_now(model.device)]
    parts = tqdm(pixels.split(IMAGES_AT_ONCE) if new else (), "pictures", disable=not progress)
    features = [rows for part in parts for rows in model.image_features(part)]
    pictures = list(zip(new, features, strict=True))
    times.append(_now(model.device))

    # The whole prompt at once, or chunks counted from each prompt's end, so that all end together.
    talk.cache.reserve(plan)
    phase = Phase.PREFILL if conversation is None else Phase.LATER_TURN
    todo = max(end - done for end, done in zip(lengths, talk.cached, strict=True))
    chunk = min(prefill_chunk or todo, todo)
    if chunk < todo:
        phase = Phase.CHUNKED_PREFILL
    to_come = range((todo - 1) // chunk * chunk, -1, -chunk)  # tokens left behind each chunk
    for left in tqdm(to_come, "prefill", disable=not progress):
        ends = [max(done, end - left) for end, done in zip(lengths, talk.cached, strict=True)]
        hidden = run(model, talk, ends, phase, pictures)
    tokens = _choose(model.logits(hidden), temperature, top_p, generator)
    cache_bytes = talk.cache.bytes_per_stage
    times.append(_now(model.device))

    talk.cache.reserve(plan, extra=max_new_tokens - 1)  # the last token is not run
    ids: list[list[int]] = [[] for _ in prompts]
    shown = ["" for _ in prompts]
    going = list(range(len(prompts)))
    for step in tqdm(range(max_new_tokens), "tokens", disable=not progress):
        if step:
            # A sequence that is done takes part with an empty chunk: no rows, and its cache stays.
            ends = [done + (b in going) for b, done in enumerate(talk.cached)]
            hidden = run(model, talk, ends, Phase.DECODE)
            tokens = _choose(model.logits(hidden), temperature, top_p, generator)
        for b, token in zip(going, tokens, strict=True):
            talk.tokens[b].append(token)
            ids[b].append(token)
            text = model.processor.decode(ids[b])
            whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # else a character is cut
            piece, shown[b] = (text[len(shown[b]) :], text) if whole else ("", shown[b])
            if on_token is not None:
                on_token(b, token, piece)
        going = [b for b in going if ids[b][-1] not in model.config.stop_token_ids]
        going = [b for b in going if not any(text in shown[b] for text in stop)]
        if not going:
            break
    times.append(_now(model.device))
    seconds = [after - before for before, after in zip(times, times[1:], strict=False)]
    texts = [_cut(model.processor.decode(answer), stop) for answer in ids]
    return Generation(texts, ids, *seconds, step, cache_bytes, plan, talk)


def read_turn(
    model: Llava,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image]] | None,
    max_new_tokens: int,
    earlier: Conversation | None = None,
) -> tuple[Conversation, Tensor, list[VisionSpan]]:
    """The conversation with a turn's tokens added, and that turn's pictures: pixels, and their spans.

    Runs nothing; an `earlier` conversation is only changed once all has been checked.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts: expected a list of str")
    given = [[] for _ in prompts] if images is None else [list(some) for some in images]
    talk = earlier or Conversation([[] for _ in prompts], [], [0] * len(prompts), None)
    if not len(prompts) == len(given) == len(talk.tokens) or not prompts:
        got = f"{len(prompts)} prompts, {len(given)} lists of images, {len(talk.tokens)} sequences"
        raise ValueError(f"prompts, images: expected one of each for each sequence, got {got}")
    if earlier is not None and earlier.cache.schedule != model.schedule:
        raise ValueError(f"conversation: its cache is for schedule {earlier.cache.schedule!s}")
    config, tokens, spans = model.config, [], []
    for b, (prompt, before) in enumerate(zip(prompts, talk.tokens, strict=True)):
        ids, starts = model.processor.encode(prompt, len(given[b]), begins=earlier is None)
        # With a class token among them the rows are no grid.
        shape = (config.tokens_per_image, *([config.grid] * 2 * (not config.keep_class_token)))
        spans += [(b, len(before) + start, *shape) for start in starts]
        tokens.append(before + ids)
        total = len(tokens[b]) + max_new_tokens
        if total > config.max_positions:
            limit = f"at most {config.max_positions} tokens"
            raise ValueError(f"prompts[{b}]: expected {limit} with the new ones, got {total}")
        if ids[-1] == config.image_token_id and model.schedule.num_stages > 1:
            raise ValueError(
                f"prompts[{b}]: expected text after the last picture, which is dropped"
            )
    pixels = model.processor.pixels([image for some in given for image in some])
    if earlier is None:
        talk.cache = model.new_cache(len(prompts))
    talk.tokens, talk.vision_spans = tokens, talk.vision_spans + spans
    return talk, pixels, spans


def run(
    model: Llava,
    talk: Conversation,
    ends: Sequence[int],
    phase: Phase,
    pictures: Sequence[tuple[VisionSpan, Tensor]] = (),
    all_rows: bool = False,
) -> Tensor:
    """Run each sequence from what is cached up to `ends`, with the rows of the pictures on the way.

    Returns hidden rows of the last stage: the last one of each sequence that has any, or all.
    """
    chunks = list(zip(talk.cached, ends, strict=True))
    cu_seqlens = _offsets([len(tokens) for tokens in talk.tokens])
    plan = make_plan(model.schedule, cu_seqlens, talk.vision_spans, model.device, chunks=chunks)
    x = model.embed([t for b, (lo, hi) in enumerate(chunks) for t in talk.tokens[b][lo:hi]])
    first = _offsets([hi - lo for lo, hi in chunks])
    for (b, start, length, *_), rows in pictures:
        lo, hi = max(chunks[b][0], start), min(chunks[b][1], start + length)
        if lo < hi:
            at = first[b] - chunks[b][0]
            x[at + lo : at + hi] = rows[lo - start : hi - start]
    x = model(x, plan, phase, talk.cache)
    talk.cached = list(ends)
    if all_rows:
        return x
    lens = plan.stages[-1].seq_lens
    last = [end - 1 for end, n in zip(accumulate(lens), lens, strict=True) if n]
    return x[torch.tensor(last, dtype=torch.int64).to(x.device, non_blocking=True)]


def _choose(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> list[int]:
    """A token for each row. Reading them is the one place where a step waits for the device."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    shares, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    shares[shares.cumsum(-1) - shares >= top_p] = 0  # the likeliest always stays
    return tokens.gather(-1, shares.multinomial(1, generator=generator))[:, 0].tolist()


def _now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
