"""Answering a batch of prompts: prefill (whole or in chunks), then one token at a time, turn after turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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
from .processor import TextStream

if TYPE_CHECKING:
    from .model import Llava

VisionSpan = tuple[int, int, int, int, int]  # sequence, start, length, height, width
IMAGES_AT_ONCE = 16  # through the vision tower, which is what bounds its memory


@dataclass
class Conversation:
    """A batch of conversations so far, and the cache that holds all but each one's last token.

    The last token that was generated has not been run yet: a later turn runs it before its own.
    """

    tokens: list[list[int]]  # with every picture expanded to its rows
    vision_spans: list[VisionSpan]
    cached: list[int]  # how many of each sequence's tokens have been run
    cache: KVCache


@dataclass
class Generation:
    """What `generate` returns.

    `cache_bytes` is the size of the K and V that the prefill filled, read off their storages before room
    for generated tokens is added; the first token counts as prefill in the times.
    """

    texts: list[str]
    token_ids: list[list[int]]
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    cache_bytes_per_stage: tuple[int, ...]
    plan: CompressionPlan  # of the whole conversation, as if run at once
    vision_spans: list[VisionSpan]
    conversation: Conversation  # for a later turn

    @property
    def cache_bytes(self) -> int:
        """Over all stages."""
        return sum(self.cache_bytes_per_stage)


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
    stop: Sequence[str] = (),
    prefill_chunk: int | None = None,
    on_token: Callable[[int, int, str], None] | None = None,
    progress: bool = False,
    conversation: Conversation | None = None,
) -> Generation:
    """Answer a batch of prompts.

    Args:
        prompts: one text per sequence, `<image>` where a picture goes.
        images: the pictures of each sequence in order; None where no prompt has any.
        max_new_tokens: at most so many for each sequence, at least 1.
        temperature: 0 takes the most likely token; above 0 samples, with `top_p` and `seed`.
        stop: texts that end an answer and are cut off it, beside the checkpoint's stop tokens.
        prefill_chunk: run prompts in parts of so many tokens, which bounds the memory they take.
        on_token: called as `on_token(sequence, token_id, piece_of_text)` for each new token. A piece is
            empty while its characters are not whole.
        progress: show bars.
        conversation: go on with this one (`Generation.conversation`) instead of starting anew: the prompts
            are the next turn of each of its sequences.

    Raises: ValueError or TypeError for bad input, before anything is run.
    """
    if max_new_tokens < 1 or (prefill_chunk is not None and prefill_chunk < 1):
        raise ValueError(
            f"max_new_tokens and prefill_chunk must be at least 1, got {max_new_tokens}, {prefill_chunk}"
        )
    sampler = Sampler(temperature, top_p, seed, model.device)
    talk, pixels, new_spans = read_turn(model, prompts, images, max_new_tokens, conversation)
    lengths = [len(tokens) for tokens in talk.tokens]
    plan = make_plan(model.schedule, _offsets(lengths), talk.vision_spans, model.device)

    clock = Clock(model.device)
    features: list[Tensor] = []
    for part in tqdm(pixels.split(IMAGES_AT_ONCE), desc="pictures", disable=not progress):
        features += model.image_features(part).unbind() if len(part) else ()
    vision_seconds = clock.lap()

    phase = Phase.PREFILL if conversation is None else Phase.LATER_TURN
    hidden = prefill(model, talk, plan, phase, prefill_chunk, new_spans, features, progress)
    tokens = sampler(model.logits(hidden))
    cache_bytes = talk.cache.bytes_per_stage
    prefill_seconds = clock.lap()

    # Room for every token to come, the last of which is never run.
    talk.cache.reserve(plan, extra=max_new_tokens - 1)
    streams = [TextStream(model.processor) for _ in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for step in tqdm(range(max_new_tokens), desc="tokens", disable=not progress):
        for b, token in zip(going, tokens, strict=True):
            talk.tokens[b].append(token)
            answers[b].append(token)
            piece = streams[b].push(token)
            if on_token is not None:
                on_token(b, token, piece)
        ended = model.config.stop_token_ids
        going = [
            b
            for b in going
            if answers[b][-1] not in ended and not any(text in streams[b].text for text in stop)
        ]
        if not going or step == max_new_tokens - 1:
            break
        # A sequence that is done takes part with an empty chunk: it has no rows, and keeps its cache.
        ends = [talk.cached[b] + (b in going) for b in range(len(prompts))]
        hidden = run_chunk(model, talk, ends, Phase.DECODE)
        tokens = sampler(model.logits(hidden))
    return Generation(
        texts=[_cut(model.processor.decode(ids), stop) for ids in answers],
        token_ids=answers,
        vision_seconds=vision_seconds,
        prefill_seconds=prefill_seconds,
        decode_seconds=clock.lap(),
        decode_steps=step,
        cache_bytes_per_stage=cache_bytes,
        plan=plan,
        vision_spans=talk.vision_spans,
        conversation=talk,
    )


def read_turn(
    model: Llava,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image]] | None,
    max_new_tokens: int,
    earlier: Conversation | None,
) -> tuple[Conversation, Tensor, list[VisionSpan]]:
    """The conversation with a turn's tokens added, and the turn's pictures: pixels and where they go.

    Nothing is run, and `earlier` is left as it is until all has been checked.
    """
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise TypeError("prompts must be a list of str")
    if not prompts:
        raise ValueError("prompts is empty")
    pictures = [[] for _ in prompts] if images is None else [list(given) for given in images]
    if len(pictures) != len(prompts):
        raise ValueError(f"images must have one list per prompt, {len(prompts)}, got {len(pictures)}")
    if earlier is not None and len(earlier.tokens) != len(prompts):
        raise ValueError(f"the conversation has {len(earlier.tokens)} sequences, got {len(prompts)}")
    config, grid = model.config, model.config.grid
    before = [[] for _ in prompts] if earlier is None else earlier.tokens
    tokens: list[list[int]] = []
    spans: list[VisionSpan] = []
    for b, (prompt, given) in enumerate(zip(prompts, pictures, strict=True)):
        ids, starts = model.processor.encode(prompt, len(given), begins=earlier is None)
        spans += [
            (b, len(before[b]) + at, config.tokens_per_image, grid, grid) for at in starts
        ]
        tokens.append(before[b] + ids)
        if ids[-1] == config.image_token_id and model.schedule.num_stages > 1:
            raise ValueError(
                f"prompt {b} ends in a picture, whose last row the schedule may drop: add some text"
            )
        if len(tokens[b]) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"sequence {b}: {len(tokens[b])} tokens and {max_new_tokens} new ones are more than "
                f"the model's {config.max_positions} positions"
            )
    size = (0, 3, config.image_size, config.image_size)
    flat = [picture for given in pictures for picture in given]
    pixels = model.processor.pixels(flat) if flat else torch.empty(size)
    if earlier is None:
        cache = model.new_cache(len(prompts))
        return Conversation(tokens, spans, [0] * len(prompts), cache), pixels, spans
    earlier.tokens = tokens
    earlier.vision_spans = earlier.vision_spans + spans
    return earlier, pixels, spans


def prefill(
    model: Llava,
    talk: Conversation,
    plan: CompressionPlan,
    phase: Phase,
    size: int | None,
    spans: Sequence[VisionSpan],
    features: Sequence[Tensor],
    progress: bool,
) -> Tensor:
    """Run all that is not cached yet; returns the hidden row behind which each sequence goes on.

    Chunks are counted from each prompt's end, so that all of them end in the last one.
    """
    talk.cache.reserve(plan)
    ends = [len(tokens) for tokens in talk.tokens]
    longest = max(end - done for end, done in zip(ends, talk.cached, strict=True))
    if size is None or size >= longest:
        return run_chunk(model, talk, ends, phase, spans, features)
    left = range((longest - 1) // size * size, -1, -size)  # tokens still to come behind each chunk
    for rest in tqdm(left, desc="prefill", disable=not progress):
        now = [max(done, end - rest) for end, done in zip(ends, talk.cached, strict=True)]
        hidden = run_chunk(model, talk, now, Phase.CHUNKED_PREFILL, spans, features)
    return hidden


def run_chunk(
    model: Llava,
    talk: Conversation,
    ends: Sequence[int],
    phase: Phase,
    spans: Sequence[VisionSpan] = (),
    features: Sequence[Tensor] = (),
    all_rows: bool = False,
) -> Tensor:
    """Run each sequence's tokens from what is cached up to `ends`; returns rows of the last stage.

    `features[i]` are the rows of the picture at `spans[i]`. Returned are the last row of each sequence that
    has any, or all rows.
    """
    lengths = [len(tokens) for tokens in talk.tokens]
    chunks = list(zip(talk.cached, ends, strict=True))
    plan = make_plan(
        model.schedule, _offsets(lengths), talk.vision_spans, model.device, chunks=chunks
    )
    x = model.embed(
        [t for tokens, (lo, hi) in zip(talk.tokens, chunks, strict=True) for t in tokens[lo:hi]]
    )
    first = _offsets([hi - lo for lo, hi in chunks])
    for (b, start, length, *_), rows in zip(spans, features, strict=True):
        lo, hi = max(chunks[b][0], start), min(chunks[b][1], start + length)
        if lo < hi:
            at = first[b] - chunks[b][0]
            x[at + lo : at + hi] = rows[lo - start : hi - start]
    x = model(x, plan, phase, talk.cache)
    talk.cached = list(ends)
    if all_rows:
        return x
    last = plan.stages[-1]
    ends_at = [end - 1 for end, n in zip(accumulate(last.seq_lens), last.seq_lens) if n]
    return x[torch.tensor(ends_at, dtype=torch.int64).to(x.device, non_blocking=True)]


class Sampler:
    """Logits [rows, vocab] to one token id each. Reading them is the step's one wait for the device."""

    def __init__(self, temperature: float, top_p: float, seed: int | None, device: torch.device) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature must be at least 0 and top_p in (0, 1], got {temperature}, {top_p}"
            )
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator(device)
        if seed is not None:
            self.generator.manual_seed(seed)
        else:
            self.generator.seed()

    def __call__(self, logits: Tensor) -> list[int]:
        if self.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            shares, tokens = (logits / self.temperature).softmax(-1).sort(descending=True)
            shares[shares.cumsum(-1) - shares >= self.top_p] = 0  # the most likely one always stays
            drawn = torch.multinomial(shares, 1, generator=self.generator)
            chosen = tokens.gather(-1, drawn)[:, 0]
        ids: list[int] = chosen.tolist()
        return ids


class Clock:
    """Seconds of finished device work between laps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last = 0.0
        self.lap()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before whichever stop text comes first."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
