"""What `apply_adsc` costs and saves in a prefill on this CPU: a 1B-class decoder cut to 4 layers.

    python bench/hf_cost.py [--tokens 576] [--runs 7]

Dense, with a schedule that keeps all (the hooks alone), and compressed, by turns on one model; the
decoder's MACs say what the compressed one should take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import transformers as hf

from adsc_kernels import CompressionSchedule, apply_adsc

LAYERS, TEXT_TOKENS = 4, 64
WIDTH, INNER, HEADS, KV_HEADS, HEAD = 2048, 8192, 32, 8, 64  # Llama 3.2 1B


def model_of(tokens: int) -> Any:
    side = round(tokens**0.5)
    text = hf.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        vocab_size=1000,
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * side,
        patch_size=4,
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return hf.LlavaForConditionalGeneration(config).eval()


def macs(rows: list[int]) -> int:
    """Of the decoder: projections, MLP, and attention as sdpa computes it, not halved."""
    linear = WIDTH * HEAD * (2 * HEADS + 2 * KV_HEADS) + 3 * WIDTH * INNER
    return sum(n * linear + 2 * n * n * HEADS * HEAD for n in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--schedule", default="1:1/4,2:1/4,3:1/4")
    args = parser.parse_args()
    schedule = CompressionSchedule.parse(args.schedule, LAYERS)
    model = model_of(args.tokens)
    side = 4 * round(args.tokens**0.5)
    half = torch.full((1, TEXT_TOKENS // 2), 5)
    ids = torch.cat([half, torch.full((1, args.tokens), 3), half], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side)}

    @torch.inference_mode()
    def seconds() -> float:
        start = time.perf_counter()
        model(**inputs, logits_to_keep=1)
        return time.perf_counter() - start

    ways: dict[str, list[float]] = {"dense": [], "hooks alone": [], "compressed": []}
    keep_all = ",".join(f"{b.layer}:1" for b in schedule.boundaries)
    for turn in range(args.runs + 1):
        for name, applied in (("dense", None), ("hooks alone", keep_all), ("compressed", schedule)):
            if applied is None:
                took = seconds()
            else:
                with apply_adsc(model, applied):
                    took = seconds()
            if turn:
                ways[name].append(took)
    times = {name: statistics.median(took) for name, took in ways.items()}
    kept = schedule.kept(args.tokens)
    rows = [TEXT_TOKENS + kept[schedule.stage_of_layer(n)] for n in range(LAYERS)]
    promised = macs(rows) / macs([TEXT_TOKENS + args.tokens] * LAYERS)
    for name, took in times.items():
        print(f"{name:12} {took * 1e3:8.1f} ms {took / times['dense']:7.3f}")
    print(f"{'MACs':12} {'':11} {promised:7.3f}")


if __name__ == "__main__":
    main()
