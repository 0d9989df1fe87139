"""``adsc bench e2e``: prompts and answers of a whole decoder on this machine, dense and compressed.

Weights and picture features are random and made on the device, in the shape of a known model. The
ways take turns: our dense decoder; schedules; as many vision tokens as the first schedule processes
on average kept before the decoder, and made in the first place (a smaller picture); transformers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adsc_kernels.budget import PRESETS
from adsc_kernels.cli import options
from adsc_kernels.cli.text import in_bytes, table
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    import torch

    from adsc_kernels.llava import Llava

TEXT = (35, 66)  # tokens in front of the picture and behind it
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES = {
    "tiny": (64, 128, 4, 4, 2, 256),
    "llava-1.5-7b": (4096, 11008, 32, 32, 32, 32064),
    "llava-1.5-13b": (5120, 13824, 40, 40, 40, 32064),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "qwen2.5-vl-7b": (3584, 18944, 28, 28, 4, 152064),
}
# One answer: milliseconds to the first token and for each one after it, bytes of the cache.
Answer = tuple[float, float, int]


def execute(args: argparse.Namespace) -> None:
    """Measure and print."""
    import torch

    device = options.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        found = measure(
            args.shape, args.batch, args.vision, args.new_tokens, args.runs, device, dtype
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"--shape, --batch: {device} ran out of memory ({error})") from None
    if args.json:
        print(json.dumps(found, indent=1))
        return
    rows = [
        [
            row["way"],
            f"{row['ttft_ms']:.1f}",
            f"{row['ms_per_token']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            in_bytes(row["cache_bytes"]),
            "-" if row["peak_bytes"] is None else in_bytes(row["peak_bytes"]),
        ]
        for row in found["rows"]
    ]
    print(f"{found['device']}, torch {found['torch']}: {found['case']}\n")
    heads = ["way", "first token, ms", "ms per token", "tokens/s", "cache", "peak memory"]
    print(table(heads, rows, left=1))


def schedules_of(shape: str, depth: int) -> dict[str, CompressionSchedule]:
    """The presets of a shape; 1/4 at each quarter of the depth where it has none."""
    names = [name for name in PRESETS if name.startswith(f"{shape}/")]
    if names:
        return {name.rpartition("/")[2]: CompressionSchedule.preset(name) for name in names}
    text = ",".join(f"{depth * quarter // 4}:1/4" for quarter in (1, 2, 3))
    return {text: CompressionSchedule.parse(text, num_layers=depth)}


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Llava:
    """The thin model in a known shape, without a tower or a processor."""
    import torch
    import transformers

    from adsc_kernels.llava import Llava, LlavaConfig

    text = transformers.LlamaConfig(
        **dict(zip(_SIZES, SHAPES[shape], strict=True)), max_position_embeddings=2**16
    )
    hf = transformers.LlavaConfig(text_config=text, image_token_index=0)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        config = LlavaConfig.from_folder(Path(folder))
    model = Llava(config, cast(Any, None)).eval()
    rng = torch.Generator(device).manual_seed(0)
    state = {}
    for name, p in model.named_parameters():
        if name.startswith(("language_model.", "lm_head.")):
            weight = torch.empty(p.shape, dtype=dtype, device=device)
            state[name] = (
                weight.fill_(1) if p.dim() == 1 else weight.normal_(0, 0.02, generator=rng)
            )
    model.load_state_dict(state, strict=False, assign=True)
    model.language_model.to(device)
    return model


def measure(
    shape: str,
    batch: int,
    vision: int,
    new_tokens: int,
    runs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Medians of `runs` answers by each way, after two to warm up: graphs are captured then."""
    import torch

    import adsc_kernels

    model = random_model(shape, device, dtype)
    depth = model.config.num_layers
    schedules = schedules_of(shape, depth)
    first, average = next(iter(schedules.values())), Fraction(0)
    for layer in range(depth):
        average += Fraction(first.kept(vision)[first.stage_of_layer(layer)], depth)
    tokens = max(round(average), 1)
    before = CompressionSchedule.parse(f"0:{Fraction(tokens, vision)}", num_layers=depth)
    every: dict[str, Callable[[], Answer]] = {"dense": _ours(model, batch, vision, new_tokens)}
    for name, schedule in schedules.items():
        every[name] = _ours(model.with_schedule(schedule), batch, vision, new_tokens)
    every[f"{tokens} kept before the decoder"] = _ours(
        model.with_schedule(before), batch, vision, new_tokens
    )
    every[f"picture of {tokens}"] = _ours(model, batch, tokens, new_tokens)
    every["transformers, sdpa"] = _theirs(model, batch, vision, new_tokens)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    text = sum(TEXT)
    return {
        "device": name,
        "torch": torch.__version__,
        "adsc_kernels": adsc_kernels.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "case": f"{shape}, batch {batch}, {vision} + {text} tokens, {new_tokens} new, {dtype}",
        "schedules": {name: str(schedule) for name, schedule in schedules.items()},
        "rows": _by_turns(every, batch, new_tokens, runs, device),
    }


def _by_turns(
    every: dict[str, Callable[[], Answer]],
    batch: int,
    new_tokens: int,
    runs: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    import torch

    answers: dict[str, list[Answer]] = {name: [] for name in every}
    peaks: dict[str, int | None] = dict.fromkeys(every)
    for _ in options.progress(range(2 + runs), "runs"):
        for name, answer in every.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            answers[name].append(answer())
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device)
    rows = []
    for name, of in answers.items():
        first_ms, each_ms = (statistics.median(a[i] for a in of[2:]) for i in (0, 1))
        seconds = (first_ms + each_ms * (new_tokens - 1)) / 1e3
        rows.append(
            {
                "way": name,
                "ttft_ms": round(first_ms, 3),
                "ms_per_token": round(each_ms, 3),
                "tokens_per_second": round(batch * new_tokens / seconds, 1),
                "cache_bytes": of[-1][2],
                "peak_bytes": peaks[name],
            }
        )
    return rows


def _ours(model: Llava, batch: int, vision: int, new_tokens: int) -> Callable[[], Answer]:
    import torch

    from adsc_kernels.cache import Phase
    from adsc_kernels.decode import DecodeState
    from adsc_kernels.plan import make_plan
    from adsc_kernels.sampling import choose

    length = sum(TEXT) + vision
    bounds = [b * length for b in range(batch + 1)]
    spans = [(b, TEXT[0], vision) for b in range(batch)]
    x = _rows(model, batch * length)
    rng = torch.Generator(x.device)

    @torch.no_grad()
    def answer() -> Answer:
        begin = _now(x.device)
        plan = make_plan(model.schedule, bounds, spans, x.device)
        cache = model.new_cache(batch)
        cache.fit(plan, extra=new_tokens - 1)
        hidden = model(x, plan, Phase.PREFILL, cache)
        last = torch.tensor(list(accumulate(plan.stages[-1].seq_lens))) - 1
        tokens = choose(model.logits(hidden[last.to(x.device, non_blocking=True)]), 0, 1, rng)
        first = _now(x.device)
        state = DecodeState(cache, [length] * batch, new_tokens - 1)
        for _ in range(new_tokens - 1):
            tokens = choose(model.decode(tokens, state), 0, 1, rng)
        each = (_now(x.device) - first) / max(new_tokens - 1, 1)
        return (first - begin) * 1e3, each * 1e3, sum(cache.bytes_per_stage)

    return answer


def _theirs(model: Llava, batch: int, vision: int, new_tokens: int) -> Callable[[], Answer]:
    """transformers' own decoder of this shape, with weights of its own."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    known = inspect.signature(LlamaForCausalLM.forward).parameters
    named = "cache" if "cache" in known else "past_key_values"  # 5.24 renamed it
    length = sum(TEXT) + vision
    x = _rows(model, batch * length).view(batch, length, -1)
    with x.device:
        text = model.config.hf.text_config
        theirs = LlamaForCausalLM._from_config(text, attn_implementation="sdpa", dtype=x.dtype)
    theirs.eval()

    @torch.no_grad()
    def answer() -> Answer:
        begin = _now(x.device)
        cache = DynamicCache()
        out = theirs(inputs_embeds=x, use_cache=True, logits_to_keep=1, **{named: cache})
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        first = _now(x.device)
        for _ in range(new_tokens - 1):
            out = theirs(input_ids=tokens, use_cache=True, **{named: cache})
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        each = (_now(x.device) - first) / max(new_tokens - 1, 1)
        size = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
        return (first - begin) * 1e3, each * 1e3, size

    return answer


def _rows(model: Llava, count: int) -> torch.Tensor:
    import torch

    weight = model.language_model.embed_tokens.weight
    return torch.randn(count, weight.shape[1], dtype=weight.dtype, device=weight.device) * 0.02


def _now(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
