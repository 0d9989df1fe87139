"""``adsc run --engine transformers``: any supported model, as it is and with ``apply_adsc``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def check(args: argparse.Namespace) -> None:
    """Options that only the thin model has; ValueError for one that is given."""
    for name, given, plain in (
        ("--adapter", args.adapter, None),
        ("--temperature", args.temperature, 0.0),
        ("--prefill-chunk", args.prefill_chunk, None),
    ):
        if given != plain:
            raise ValueError(
                f"{name}: expected the default with --engine transformers, got {given}"
            )


def execute(
    args: argparse.Namespace,
    folder: Path,
    images: list[Image],
    questions: list[str],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Answer each question dense and compressed, and print both with what the caches hold."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from adsc_kernels.cli.run import default_schedule
    from adsc_kernels.integrations.hf import apply_adsc

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    depth = model.config.get_text_config().num_hidden_layers
    if args.schedule is None:
        schedule = default_schedule(model.config, depth)
    else:
        schedule = CompressionSchedule.parse(args.schedule, num_layers=depth)
    facts: dict[str, Any] = {"model": str(args.model or folder.name), "schedule": str(schedule)}
    facts["answers"] = []
    for question in questions:
        inputs = _inputs(processor, images, question).to(device, dtype)
        dense = _answer(model, processor, inputs, args)
        with apply_adsc(model, schedule):
            compressed = _answer(model, processor, inputs, args)
        facts["answers"].append({"question": question, "dense": dense, "compressed": compressed})
    print(json.dumps(facts, indent=1) if args.json else _as_text(facts))


def _inputs(processor: Any, images: list[Image], question: str) -> Any:
    pictures = [{"type": "image"} for _ in images]
    content = [*pictures, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=[prompt], images=images, return_tensors="pt")


def _answer(model: Any, processor: Any, inputs: Any, args: argparse.Namespace) -> dict[str, Any]:
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    start = time.perf_counter()
    out = model.generate(**inputs, **options, return_dict_in_generate=True)
    seconds = time.perf_counter() - start
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    layers = out.past_key_values.layers
    return {
        "text": processor.decode(new, skip_special_tokens=True).strip(),
        "seconds": seconds,
        "cache_bytes": sum(part.nbytes for layer in layers for part in (layer.keys, layer.values)),
        "cached_tokens": [layer.keys.shape[2] for layer in layers],
    }


def _as_text(facts: dict[str, Any]) -> str:
    lines = [f"{facts['model']}, {facts['schedule']}"]
    for answer in facts["answers"]:
        lines.append(f"\n{answer['question']}")
        for way in ("dense", "compressed"):
            got = answer[way]
            size = f"{got['cache_bytes'] / 2**20:.2f} MiB of KV cache"
            lines.append(f"  {way:10} {got['text']!r}  {size}, {got['seconds']:.2f} s")
    return "\n".join(lines)
