"""What `apply_adsc` costs and saves in a prefill: of a 1B-class decoder, or LLaVA-7B's.

    python bench/hf_cost.py [--batch 4] [--rounds 15]
    python bench/hf_cost.py --device cuda --dtype bfloat16 --shape 7b --layers 32 --batch 8
        --schedules 5:1/3,17:1/3 --new-tokens 32

Made for a machine that others use too. On a CPU times are CPU seconds of one thread, which don't
count waiting; on a GPU they lie between events, so that waiting for the host counts. Each round
calls the model dense and with each schedule, beginning with another one each time; and what is told
is the median over rounds of the ratio to the dense call beside it, with its quartiles. MACs say
what a compressed call should take, those of the projector among them, which no schedule makes
fewer; and the decoder's matrix products alone, which are timed in the same rounds, what they take
here with so few rows.
What the hooks do does not depend on the width, so they are timed on a narrow decoder, where their
share is large, under a schedule that keeps all as well; and what they call is counted there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

from adsc_kernels import CompressionSchedule, apply_adsc

TEXT_TOKENS, TOWER_WIDTH = 64, 32


class Shape(NamedTuple):
    """Of a decoder layer."""

    width: int
    inner: int
    heads: int
    kv_heads: int
    head: int

    def macs(self, tokens: int, rows: list[int]) -> int:
        """Of the projector, and of layers with so many rows: projections, MLP, and attention, which
        is not halved."""
        attended = self.heads * self.head
        linear = self.width * (2 * attended + 2 * self.kv_heads * self.head)
        linear += 3 * self.width * self.inner
        projector = tokens * (TOWER_WIDTH + self.width) * self.width
        return projector + sum(n * linear + 2 * n * n * attended for n in rows)


SHAPES = {
    "1b": Shape(2048, 8192, 32, 8, 64),  # Llama 3.2 1B
    "7b": Shape(4096, 11008, 32, 32, 128),  # LLaVA-1.5-7B
}
NARROW = Shape(64, 64, 1, 1, 64)


def model_of(shape: Shape, layers: int, tokens: int) -> Any:
    """LLaVA with a vision tower that costs next to nothing."""
    text = hf.LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        vocab_size=1000,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * round(tokens**0.5),
        patch_size=4,
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return hf.LlavaForConditionalGeneration(config).eval()


class Ways:
    """One model dense and with each of some schedules, by their names."""

    def __init__(
        self,
        device: str,
        shape: Shape,
        schedules: Mapping[str, CompressionSchedule],
        tokens: int,
        batch: int = 1,
    ) -> None:
        (layers,) = {schedule.num_layers for schedule in schedules.values()}
        with torch.device(device):
            self.model = model_of(shape, layers, tokens)
        half = torch.full((batch, TEXT_TOKENS // 2), 5)
        ids = torch.cat([half, torch.full((batch, tokens), 3), half], 1)
        side = 4 * round(tokens**0.5)
        pixels = torch.randn(batch, 3, side, side)
        self.inputs = {"input_ids": ids.to(device), "pixel_values": pixels.to(device)}
        self.schedules = {"dense": None, **schedules}
        self.rows = {"dense": [TEXT_TOKENS + tokens] * layers}
        for way, schedule in schedules.items():
            kept = schedule.kept(tokens)
            stages = [schedule.stage_of_layer(n) for n in range(layers)]
            self.rows[way] = [TEXT_TOKENS + kept[stage] for stage in stages]
        self.operands: dict[tuple[int, int], torch.Tensor] = {}

    def applied(self, way: str) -> AbstractContextManager[Any]:
        schedule = self.schedules[way]
        return nullcontext() if schedule is None else apply_adsc(self.model, schedule)

    def call(self, way: str) -> None:
        self.model(**self.inputs, logits_to_keep=1)

    def products(self, way: str) -> None:
        """The decoder's matrix products alone, of as many rows."""
        layers = self.model.model.language_model.layers
        for layer, rows in zip(layers, self.rows[way], strict=True):
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    size = rows * len(self.inputs["input_ids"]), module.in_features
                    if size not in self.operands:
                        self.operands[size] = torch.randn(size, device=self.model.device)
                    module(self.operands[size])

    def seconds(self, rounds: int, *calls: Callable[[str], Any]) -> list[dict[str, list[float]]]:
        """What each of the calls took each way in each round."""
        took: list[dict[str, list[float]]] = [{way: [] for way in self.schedules} for _ in calls]
        order = list(self.schedules)
        for turn in range(-1, rounds):
            for way in order:
                with self.applied(way):
                    ones = [timed(partial(call, way), self.model.device.type) for call in calls]
                if turn >= 0:
                    for found, one in zip(took, ones, strict=True):
                        found[way].append(one)
            order.append(order.pop(0))
        return took

    def generate(self, new_tokens: int) -> Any:
        """So many tokens with a dynamic cache; what `generate` returns."""
        options = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        return self.model.generate(
            **self.inputs, **options, pad_token_id=0, return_dict_in_generate=True
        )

    def cache_bytes(self, way: str) -> int:
        """Of the cache behind the prompt and one token."""
        with self.applied(way):
            layers = self.generate(1).past_key_values.layers
        return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))

    def counts(self, way: str) -> tuple[int, int]:
        """Python functions and torch ops that a call goes through."""
        with self.applied(way):
            self.call(way)
            calls = _counted_calls(partial(self.call, way))
            with _Dispatches() as dispatches:
                self.call(way)
        return calls, dispatches.count


def timed(call: Callable[[], Any], device: str) -> float:
    """CPU seconds of this process, or seconds between two events on the GPU."""
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


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


def show_narrow(device: str, schedule: CompressionSchedule, tokens: int, rounds: int) -> float:
    """Prints what the hooks do; returns their seconds."""
    keep_all = ",".join(f"{b.layer}:1" for b in schedule.boundaries)
    alone = CompressionSchedule.parse(keep_all, schedule.num_layers)
    ways = Ways(device, NARROW, {"hooks alone": alone, "compressed": schedule}, tokens)
    (took,) = ways.seconds(rounds, ways.call)
    print("narrow decoder: ms a call, Python calls, torch ops")
    for way in took:
        calls, dispatches = ways.counts(way)
        print(f"  {way:18} {spread(took[way], 1e3)} {calls:7} {dispatches:5}")
    extra = [a - b for a, b in zip(took["hooks alone"], took["dense"], strict=True)]
    print(f"  hooks alone take {spread(extra, 1e3)} ms", flush=True)
    return statistics.median(extra)


def show(took: dict[str, list[float]]) -> None:
    for way, seconds in took.items():
        shares = [a / b for a, b in zip(seconds, took["dense"], strict=True)]
        print(f"  {way:18} {spread(seconds)} {spread(shares)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--schedules", nargs="+", default=["1:1/4,2:1/4,3:1/4", "1:1/3,2:1/3"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new-tokens", type=int, default=0)
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, args.dtype))
    schedules = {text: CompressionSchedule.parse(text, args.layers) for text in args.schedules}
    first = schedules[args.schedules[0]]
    extra = show_narrow(args.device, first, args.tokens, 4 * args.rounds)

    shape = SHAPES[args.shape]
    ways = Ways(args.device, shape, schedules, args.tokens, args.batch)
    took, alone = ways.seconds(args.rounds, ways.call, ways.products)
    print(f"{args.shape}, {args.layers} layers, batch {args.batch}: seconds and share of dense")
    show(took)
    print("the decoder's matrix products alone")
    show(alone)
    dense = statistics.median(took["dense"])
    print(f"  hooks alone, of the narrow decoder's: {extra / dense:.2%}")
    macs = {way: shape.macs(args.tokens, rows) for way, rows in ways.rows.items()}
    for way in schedules:
        promised = macs[way] / macs["dense"]
        saved = [1 - a / b for a, b in zip(took[way], took["dense"], strict=True)]
        came = spread(saved, 1 / (1 - promised))
        print(f"  {way}: MACs promise {promised:.3f}; of the saving came {came}")
    if args.new_tokens:
        print(f"the same and {args.new_tokens} tokens", flush=True)
        show(*ways.seconds(max(2, args.rounds // 4), lambda way: ways.generate(args.new_tokens)))
        sizes = {way: ways.cache_bytes(way) for way in ways.schedules}
        print(f"  bytes of the prompt's cache: {sizes}")


if __name__ == "__main__":
    main()
