"""Answering prompts: prefill (whole or in chunks), then token by token, turn after turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from adsc_kernels import checks
from adsc_kernels.cache import KVCache, Phase
from adsc_kernels.plan import CompressionPlan, make_plan, to_device
from adsc_kernels.sampling import Inbox, check_options, check_stop, choose
from adsc_kernels.schedule import parse_share

if TYPE_CHECKING:
    from adsc_kernels.llava.model import Llava

VisionSpan = tuple[int, ...]  # sequence, start, length, height, width: as make_plan takes it
BLOCK_SIZE = 16  # rows of a block of a paged cache, as most engines have
IMAGES_AT_ONCE = 16  # through the tower: bounds its memory


@dataclass
class Conversation:
    """A batch of conversations so far; the token generated last is for a later turn to run."""

    tokens: list[list[int]]  # with every picture expanded to its rows
    vision_spans: list[VisionSpan]
    cached: list[int]  # how many of each sequence's tokens have been run
    cache: KVCache

    def compact_images(self, older_than: int, keep: str = "1/4") -> None:
        """Shrink the cache of all but the newest `older_than` pictures of each sequence.

        Of what every layer has left of an older picture the share `keep` stays, spread evenly over
        it, and the memory of the rest is given back. Each call shrinks them once more.
        """
        checks.integer("older_than", older_than, 0)
        share = parse_share(keep, 0)
        if share.keep_rows is not None:
            raise ValueError(f"keep: expected one share such as '1/4', got {checks.shown(keep)}")
        older = []
        for b in range(len(self.tokens)):
            spans = sorted(span for span in self.vision_spans if span[0] == b)
            older += spans[: max(len(spans) - older_than, 0)]
        layout = ([0, *accumulate(map(len, self.tokens))], self.vision_spans)
        chunks = [(0, n) for n in self.cached]
        plan = make_plan(self.cache.schedule, *layout, chunks=chunks)
        self.cache.compact_spans(plan, older, share.share())


@dataclass
class Generation:
    """What `generate` returns; the first token counts as prefill in the times and steps.

    `cache_bytes` is what the K and V that the prefill filled take up of their storages, in which
    there is room for the generated tokens besides.
    """

    texts: list[str]
    token_ids: list[list[int]]
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    cache_bytes_per_stage: tuple[int, ...]
    plan: CompressionPlan  # of the conversation with this turn's prompts, as if run at once
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
    stop: Sequence[str] | None = None,
    prefill_chunk: int | None = None,
    compact_early_layers: bool = False,
    on_token: Callable[[int, int, str], None] | None = None,
    progress: bool = False,
    cache: str | None = None,
    conversation: Conversation | None = None,
) -> Generation:
    """Answer a batch of prompts.

    prompts: a text for each sequence, with `<image>` where a picture goes.
    images: the pictures of each prompt, in order; None where there are none at all.
    temperature: 0 takes the likeliest token; above 0 samples, by `top_p` and `seed` (None: new).
    stop: texts that end an answer and are cut off it, beside the checkpoint's stop tokens.
    prefill_chunk: run prompts in parts of so many tokens, which bounds the memory they take.
    compact_early_layers: after the prompt, drop from the cache of the layers before the first
      boundary what that boundary drops; generated tokens then see in them what it leaves.
    on_token: called with (sequence, token id, piece of text) for each token; the piece is empty
      until its characters are whole.
    cache: of a new conversation, "dense" (None), or "paged": in blocks of BLOCK_SIZE rows.
    conversation: an earlier `Generation.conversation` to go on with: prompts are its next turn.

    Raises ValueError or TypeError for bad input, before anything is run or changed.
    """
    check_options(max_new_tokens, temperature, top_p, seed, prefill_chunk)
    checks.flag("compact_early_layers", compact_early_layers)
    checks.flag("progress", progress)
    if on_token is not None and not callable(on_token):
        raise TypeError(f"on_token: expected a function, got {checks.kind(on_token)}")
    stop = check_stop(stop)
    checks.choice("cache", cache, (None, "dense", "paged"))
    if conversation is not None:
        checks.instance("conversation", conversation, Conversation)
        if cache is not None:
            raise ValueError(f"cache: expected None for a later turn, got {cache!r}")
    rng = torch.Generator(model.device)
    rng.seed() if seed is None else rng.manual_seed(seed)
    block_size = BLOCK_SIZE if cache == "paged" else None
    talk, pixels, spans = read_turn(
        model, prompts, images, max_new_tokens, conversation, block_size
    )
    lengths = [len(tokens) for tokens in talk.tokens]
    layout = ([0, *accumulate(lengths)], talk.vision_spans)
    plan = make_plan(model.schedule, *layout, model.device)

    started = _now(model.device)
    parts = tqdm(pixels.split(IMAGES_AT_ONCE) if spans else (), "pictures", disable=not progress)
    features = [rows for part in parts for rows in model.image_features(part)]
    pictures = list(zip(spans, features, strict=True))
    seen = _now(model.device)

    # The whole prompt, or chunks counted from each prompt's end, so that all end together.
    phase = Phase.PREFILL if conversation is None else Phase.LATER_TURN
    todo = max(end - done for end, done in zip(lengths, talk.cached, strict=True))
    chunk = min(prefill_chunk or todo, todo)
    if chunk < todo:
        phase = Phase.CHUNKED_PREFILL
    talk.cache.fit(plan, extra=max_new_tokens - 1)  # the last token is not run
    begun = list(talk.cached)
    left = range((todo - 1) // chunk * chunk, -1, -chunk)  # tokens still to come after each chunk
    for rest in tqdm(left, "prefill", disable=not progress):
        ends = [max(done, end - rest) for end, done in zip(lengths, talk.cached, strict=True)]
        hidden = run(model, talk, ends, phase, pictures)
    tokens = choose(model.logits(hidden), temperature, top_p, rng)
    if compact_early_layers:
        turn = list(zip(begun, lengths, strict=True))
        whole = make_plan(model.schedule, *layout, model.device, chunks=turn)
        talk.cache.compact_early_layers(whole)
        talk.cache.fit(plan, extra=max_new_tokens - 1)
    cache_bytes = talk.cache.filled_bytes_per_stage
    filled = _now(model.device)

    ids: list[list[int]] = [[] for _ in prompts]
    shown = ["" for _ in prompts]
    going = list(range(len(prompts)))
    state = model.begin_decode(talk.cache, talk.cached, max_new_tokens - 1)
    inbox = Inbox(max_new_tokens, tokens)
    for step in tqdm(range(max_new_tokens), "tokens", disable=not progress):
        inbox.send(step, tokens)
        last = step + 1 == max_new_tokens
        if inbox.late and not last:  # before the host looks at this step's, so it never waits
            tokens = choose(model.decode(tokens, state), temperature, top_p, rng)
        now = inbox.receive(step)
        for b in going:
            token = now[b]
            talk.tokens[b].append(token)
            ids[b].append(token)
            text, piece = model.processor.decode(ids[b]), ""
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else its last character is cut
                piece, shown[b] = text[len(shown[b]) :], text
            if on_token is not None:
                on_token(b, token, piece)
        going = [b for b in going if ids[b][-1] not in model.config.stop_token_ids]
        going = [b for b in going if not any(end in shown[b] for end in stop)]
        if not going:
            break
        if not (inbox.late or last):
            tokens = choose(model.decode(tokens, state), temperature, top_p, rng)
    # Sequences that ended went on unread: their cache is as long as their answers.
    state.keep([len(answer) - 1 for answer in ids])
    talk.cached = [n + len(answer) - 1 for n, answer in zip(talk.cached, ids, strict=True)]
    texts = [model.processor.decode(answer) for answer in ids]
    for end in stop:
        texts = [text.partition(end)[0] for text in texts]
    return Generation(
        texts=texts,
        token_ids=ids,
        vision_seconds=seen - started,
        prefill_seconds=filled - seen,
        decode_seconds=_now(model.device) - filled,
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
    earlier: Conversation | None = None,
    block_size: int | None = None,
) -> tuple[Conversation, Tensor, list[VisionSpan]]:
    """The conversation with a turn's tokens added, and that turn's pictures: pixels and spans.

    Runs nothing; an `earlier` conversation is only changed once all has been checked.
    """
    prompts = checks.sequence("prompts", prompts, str)
    size = len(prompts)
    words = "a list of PIL images for each prompt"
    lists = [()] * size if images is None else checks.sequence("images", images, object, words)
    # What the lists hold is looked at by the processor, which is asked before anything moves on.
    given: list[tuple[Any, ...]] = [
        checks.sequence("images", some, object, words) for some in lists
    ]
    talk = earlier or Conversation([[]] * size, [], [0] * size, model.new_cache(size, block_size))
    if not size == len(given) == len(talk.tokens) or not prompts:
        got = f"{size} prompts, {len(given)} lists of images, {len(talk.tokens)} sequences"
        raise ValueError(f"prompts, images: expected one of each for each sequence, got {got}")
    if talk.cache.schedule != model.schedule:
        raise ValueError(f"conversation: expected one under the schedule {model.schedule!s}")
    fresh, held = (cache.stages[-1].k[0] for cache in (model.new_cache(size), talk.cache))
    if (want := _kind(fresh)) != _kind(held):
        raise ValueError(f"conversation: expected a cache of {want}, got {_kind(held)}")
    config, tokens, spans = model.config, [], []
    # With a class token among them, a picture's rows are no grid.
    grid = () if config.keep_class_token else (config.grid, config.grid)
    for b, (prompt, before) in enumerate(zip(prompts, talk.tokens, strict=True)):
        ids, starts = model.processor.encode(prompt, len(given[b]), begins=earlier is None)
        spans += [(b, len(before) + at, config.tokens_per_image, *grid) for at in starts]
        tokens.append(before + ids)
        if (total := len(tokens[b]) + max_new_tokens) > config.max_positions:
            most = f"at most {config.max_positions} tokens with the new ones"
            raise ValueError(f"prompts[{b}]: expected {most}, got {total}")
        if ids[-1] == config.image_token_id and model.schedule.num_stages > 1:
            raise ValueError(f"prompts[{b}]: expected text behind a picture to be thinned out")
    pixels = model.processor.pixels([image for some in given for image in some])
    talk.tokens, talk.vision_spans = tokens, talk.vision_spans + spans
    return talk, pixels, spans


def _kind(rows: Tensor) -> str:
    return f"{tuple(rows.shape[1:])} {rows.dtype} on {rows.device}"


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
    layout = ([0, *accumulate(map(len, talk.tokens))], talk.vision_spans)
    plan = make_plan(model.schedule, *layout, model.device, chunks=chunks)
    ids = [t for b, (lo, hi) in enumerate(chunks) for t in talk.tokens[b][lo:hi]]
    x = model.language_model.embed_tokens(to_device(np.array(ids, np.int64), model.device))
    first = [0, *accumulate(hi - lo for lo, hi in chunks)]
    for (b, start, length, *_), rows in pictures:
        lo, hi = max(chunks[b][0], start), min(chunks[b][1], start + length)
        if lo < hi:
            at = first[b] - chunks[b][0]
            x[at + lo : at + hi] = rows[lo - start : hi - start]
    x = model(x, plan, phase, talk.cache)
    talk.cached = list(ends)
    lens = plan.stages[-1].seq_lens
    last = [end - 1 for end, n in zip(accumulate(lens), lens, strict=True) if n]
    return x if all_rows else x[to_device(np.array(last, np.int64), x.device)]


def _now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
