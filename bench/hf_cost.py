"""What `apply_adsc` costs and saves in a prefill on this CPU: a 1B-class decoder cut to 4 layers.

    python bench/hf_cost.py [--tokens 576] [--rounds 15]

Made for a machine that others use too. Times are CPU seconds of one thread, which don't count
waiting; each round calls the model dense, with a schedule that keeps all (the hooks alone) and
compressed, beginning with another one each time; and what is told is the median over rounds of
the ratio to the dense call beside it, with its quartiles. The decoder's MACs say what the
compressed call should take. What the hooks do does not depend on the width, so they are timed on a
narrow decoder as well, where their share is large, and what they call is counted there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

from adsc_kernels import CompressionSchedule, apply_adsc

LAYERS, TEXT_TOKENS = 4, 64
WIDTH, INNER, HEADS, KV_HEADS, HEAD = 2048, 8192, 32, 8, 64  # Llama 3.2 1B


def model_of(tokens: int, narrow: bool = False) -> Any:
    """LLaVA with a vision tower that costs next to nothing."""
    text = hf.LlamaConfig(
        hidden_size=64 if narrow else WIDTH,
        intermediate_size=64 if narrow else INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=1 if narrow else HEADS,
        num_key_value_heads=1 if narrow else KV_HEADS,
        head_dim=HEAD,
        vocab_size=1000,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * round(tokens**0.5),
        patch_size=4,
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return hf.LlavaForConditionalGeneration(config).eval()


def macs(rows: list[int]) -> int:
    """Of the decoder: projections, MLP, and attention as sdpa computes it, not halved."""
    linear = WIDTH * HEAD * (2 * HEADS + 2 * KV_HEADS) + 3 * WIDTH * INNER
    return sum(n * linear + 2 * n * n * HEADS * HEAD for n in rows)


class Ways:
    """One model dense, with the hooks alone, and compressed."""

    def __init__(self, model: Any, schedule: CompressionSchedule, tokens: int) -> None:
        half = torch.full((1, TEXT_TOKENS // 2), 5)
        ids = torch.cat([half, torch.full((1, tokens), 3), half], 1)
        side = 4 * round(tokens**0.5)
        self.inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side)}
        self.model = model
        keep_all = ",".join(f"{b.layer}:1" for b in schedule.boundaries)
        self.schedules = {"dense": None, "hooks alone": keep_all, "compressed": schedule}

    def applied(self, way: str) -> AbstractContextManager[Any]:
        schedule = self.schedules[way]
        return nullcontext() if schedule is None else apply_adsc(self.model, schedule)

    @torch.inference_mode()
    def call(self) -> None:
        self.model(**self.inputs, logits_to_keep=1)

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """CPU seconds of each way in each round."""
        took: dict[str, list[float]] = {way: [] for way in self.schedules}
        order = list(took)
        for turn in range(-1, rounds):
            for way in order:
                with self.applied(way):
                    start = time.process_time()
                    self.call()
                    if turn >= 0:
                        took[way].append(time.process_time() - start)
            order.append(order.pop(0))
        return took

    def counts(self, way: str) -> tuple[int, int]:
        """Python functions and torch ops that a call goes through."""
        with self.applied(way):
            self.call()
            calls = _counted_calls(self.call)
            with _Dispatches() as dispatches:
                self.call()
        return calls, dispatches.count


def _counted_calls(function: Callable[[], None]) -> int:
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


class _Dispatches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def spread(values: list[float], scale: float = 1) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle * scale:8.3f} [{low * scale:.3f}, {high * scale:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--schedule", default="1:1/4,2:1/4,3:1/4")
    args = parser.parse_args()
    torch.set_num_threads(1)
    schedule = CompressionSchedule.parse(args.schedule, LAYERS)

    narrow = Ways(model_of(args.tokens, narrow=True), schedule, args.tokens)
    took = narrow.seconds(4 * args.rounds)
    print("narrow decoder: CPU ms a call, Python calls, torch ops")
    for way in took:
        calls, dispatches = narrow.counts(way)
        print(f"  {way:12} {spread(took[way], 1e3)} {calls:7} {dispatches:5}")
    extra = [a - b for a, b in zip(took["hooks alone"], took["dense"], strict=True)]
    print(f"  hooks alone take {spread(extra, 1e3)} ms")

    took = Ways(model_of(args.tokens), schedule, args.tokens).seconds(args.rounds)
    print(f"1B-class decoder: CPU s a call and share of the dense one, {args.rounds} rounds")
    for way, seconds in took.items():
        shares = [a / b for a, b in zip(seconds, took["dense"], strict=True)]
        print(f"  {way:12} {spread(seconds)} {spread(shares)}")
    dense = statistics.median(took["dense"])
    print(f"  hooks alone, of the narrow decoder's: {statistics.median(extra) / dense:.2%}")
    kept = schedule.kept(args.tokens)
    rows = [TEXT_TOKENS + kept[schedule.stage_of_layer(n)] for n in range(LAYERS)]
    promised = macs(rows) / macs([TEXT_TOKENS + args.tokens] * LAYERS)
    saved = [1 - a / b for a, b in zip(took["compressed"], took["dense"], strict=True)]
    print(f"  MACs promise {promised:.3f}; of the saving came {spread(saved, 1 / (1 - promised))}")


if __name__ == "__main__":
    main()
