"""What ``adsc run`` found, as numbers, as text and as a picture."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adsc_kernels.accounting import Account, ModelShape, account_lengths
from adsc_kernels.cli.text import (
    in_bytes,
    in_macs,
    in_time,
    layer_range,
    saved,
    share_saved,
    table,
    verdict,
)
from adsc_kernels.picture import Panel, Strip, draw, seen_box
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from adsc_kernels.cli.run import Runs
    from adsc_kernels.llava import Generation, Llava

WIDE = 40  # longer answers are set one below the other
KEYS = ("dense", "compressed")


def compare(
    model: Llava, schedule: CompressionSchedule, dense: Runs, compressed: Runs
) -> dict[str, Any]:
    """Everything that was counted and measured, as plain JSON types. Cache bytes are measured."""
    generation = compressed.generation
    costs = _accounts(model, schedule, generation)
    tokens = [len(kept) for kept in _survivors(generation, model)[0]]  # of every image alike
    dense_layer = dense.generation.cache_bytes // schedule.num_layers  # every layer holds the same
    stages: list[dict[str, Any]] = []
    for index in range(schedule.num_stages):
        layers = schedule.layers_of_stage(index)
        cache = (dense_layer * len(layers), generation.cache_bytes_per_stage[index])
        macs = [cost.stages[index].macs for cost in costs]
        stages.append(
            {
                "stage": index,
                "layers": list(layers),
                "vision_tokens_per_image": tokens[index],
                "rows": _pair([cost.stages[index].rows for cost in costs]),
                "cache_bytes": _pair(cache),
                "macs": _pair(macs),
            }
        )
    visible = sum(s["vision_tokens_per_image"] * len(s["layers"]) for s in stages)
    return {
        "model": {
            "layers": schedule.num_layers,
            "device": str(model.device),
            "dtype": str(_dtype(model)).removeprefix("torch."),
        },
        "schedule": str(schedule),
        "prompt_tokens": list(generation.plan.stages[0].seq_lens),
        "images_per_prompt": _pictures(generation) // len(generation.texts),
        "average_vision_tokens": visible / schedule.num_layers,
        "stages": stages,
        "outside": {
            f"{part}_macs": getattr(costs[0].prefill, part)
            for part in ("tower", "projector", "head")
        },
        "total": {
            "cache_bytes": _pair((dense.generation.cache_bytes, generation.cache_bytes)),
            "decoder_macs": _pair([cost.decoder_macs for cost in costs]),
            "macs": _pair([cost.macs for cost in costs]),
        },
        "convention": {
            "name": costs[0].convention.name,
            "definition": costs[0].convention.definition,
        },
        "seconds": {
            "pictures": statistics.median(dense.vision_seconds + compressed.vision_seconds),
            "prefill": _pair((dense.prefill_seconds, compressed.prefill_seconds)),
            "per_token": _pair((dense.seconds_per_token, compressed.seconds_per_token)),
        },
    }


def as_text(facts: dict[str, Any]) -> str:
    """The same for a person."""
    model, prompts = facts["model"], facts["prompt_tokens"]
    length = _span(prompts)
    images = facts["images_per_prompt"]
    head = [
        f"model     {model['name']}",
        f"          {model['layers']} layers, {model['dtype']} on {model['device']}",
        f"schedule  {facts['schedule'] or 'dense'}",
        f"pictures  {', '.join(facts['images'])}",
        f"prompts   {len(prompts)} of {length} tokens, {images} picture{'s' * (images != 1)} each",
    ]
    parts = ["\n".join(head), _answers(facts["answers"]), _stages(facts), _times(facts["seconds"])]
    parts.append(f"MACs of the prefill: {facts['convention']['definition']}.")
    parts.append(f"survivors drawn in {facts['picture']}")
    return "\n\n".join(parts)


def survivors(
    images: Sequence[Image.Image], schedule: CompressionSchedule, runs: Runs, model: Llava
) -> Image.Image:
    """The first prompt's pictures, one row each, with the patches that every stage keeps."""
    processor = model.processor.image_processor
    kept_by_image = _survivors(runs.generation, model)
    strips = []
    for image, stages in zip(images, kept_by_image, strict=True):
        captions = [
            f"stage {index}: layers {layer_range(schedule.layers_of_stage(index))}, "
            f"{len(kept)} of {len(stages[0])}"
            for index, kept in enumerate(stages)
        ]
        panels = [Panel(c, kept) for c, kept in zip(captions, stages, strict=True)]
        grid = (model.config.grid, model.config.grid)
        strips.append(Strip(image, seen_box(image.size, processor), grid, panels))
    return draw(strips, f"Patches that survive under {schedule or 'no schedule'}")


def _survivors(generation: Generation, model: Llava) -> list[list[frozenset[int]]]:
    """For each image of the first prompt, for each stage: the patches that are still there."""
    rows_by_stage = [stage.token_indices().tolist() for stage in generation.plan.stages]
    found = []
    for sequence, start, length, *_ in generation.vision_spans:
        if sequence != 0:
            continue
        # The first prompt's rows begin at row 0 of the batch. A class token is no patch.
        first, end = start + model.config.keep_class_token, start + length
        found.append(
            [frozenset(row - first for row in rows if first <= row < end) for rows in rows_by_stage]
        )
    return found


def _accounts(
    model: Llava, schedule: CompressionSchedule, generation: Generation
) -> tuple[Account, Account]:
    """Dense and compressed, split at the same layers."""
    shape = ModelShape.from_config(model.config)
    lengths = [stage.seq_lens for stage in generation.plan.stages]
    options: dict[str, Any] = {
        "tiles": _pictures(generation),
        "kv_dtype": str(_dtype(model)).removeprefix("torch."),
    }
    return (
        account_lengths(shape, schedule, [lengths[0]] * len(lengths), **options),
        account_lengths(shape, schedule, lengths, **options),
    )


def _dtype(model: Llava) -> torch.dtype:
    """Of the weights, and so of the cache."""
    return next(model.parameters()).dtype


def _pictures(generation: Generation) -> int:
    return len(generation.vision_spans)


def _pair(values: Sequence[Any]) -> dict[str, Any]:
    pair = dict(zip(KEYS, values, strict=True))
    if None not in pair.values():
        pair["saved"] = round(share_saved(*values), 6)
    return pair


def _answers(answers: list[dict[str, Any]]) -> str:
    known = any(a["expected"] is not None for a in answers)
    cells = {key: [_marked(a, key) for a in answers] for key in KEYS}
    if max(len(text) for texts in cells.values() for text in texts) > WIDE:
        blocks = []
        for index, answer in enumerate(answers):
            lines = [f"Q: {answer['question']}"]
            if answer["expected"] is not None:
                lines.append(f"  {'expected':<12}{answer['expected']}")
            lines += [
                textwrap.fill(
                    cells[key][index],
                    width=96,
                    initial_indent=f"  {key:<12}",
                    subsequent_indent=" " * 14,
                )
                for key in KEYS
            ]
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)
    rows = [
        [
            " ".join(answer["question"].split()),
            *([answer["expected"] or ""] if known else []),
            cells["dense"][index],
            cells["compressed"][index],
        ]
        for index, answer in enumerate(answers)
    ]
    header = ["question", *(["expected"] if known else []), "dense", "compressed"]
    return table(header, rows, left=len(header))


def _marked(answer: dict[str, Any], key: str) -> str:
    text = " ".join(answer[key].split())
    if answer["expected"] is None:
        return text
    return f"{text} {verdict(text == answer['expected'])}"


def _stages(facts: dict[str, Any]) -> str:
    total, outside = facts["total"], facts["outside"]
    rows = []
    for stage in facts["stages"]:
        layers = stage["layers"]
        rows.append(
            [
                f"stage {stage['stage']}",
                layer_range(range(layers[0], layers[-1] + 1)) if layers else "none",
                str(stage["vision_tokens_per_image"]),
                *_cells(stage["cache_bytes"], in_bytes),
                *_cells(stage["macs"], in_macs),
            ]
        )
    average = f"{facts['average_vision_tokens']:.2f}".rstrip("0").rstrip(".")
    decoder = [*_cells(total["cache_bytes"], in_bytes), *_cells(total["decoder_macs"], in_macs)]
    rows.append(["decoder", "all", f"mean {average}", *decoder])
    for name in ("tower", "projector", "head"):
        macs = in_macs(outside[f"{name}_macs"])
        rows.append([name, "", "", "", "", "", macs, macs, ""])
    rows.append(["total", "", "", "", "", "", *_cells(total["macs"], in_macs)])
    header = ["", "layers", "tokens/image", "cache dense", "compressed", "saved"]
    return table([*header, "MACs dense", "compressed", "saved"], rows, left=2)


def _times(seconds: dict[str, Any]) -> str:
    pictures = in_time(seconds["pictures"])  # the same work both ways
    rows = [
        ["tower and projector", pictures, pictures, ""],
        ["prefill to first token", *_cells(seconds["prefill"], in_time)],
        ["each later token", *_cells(seconds["per_token"], in_time)],
    ]
    return table(["time for the batch, median", "dense", "compressed", "saved"], rows)


def _cells(pair: dict[str, Any], unit: Any) -> list[str]:
    before, after = pair["dense"], pair["compressed"]
    change = saved(before, after) if "saved" in pair else "-"
    return [unit(before), unit(after), change]


def _span(lengths: list[int]) -> str:
    low, high = min(lengths), max(lengths)
    return str(low) if low == high else f"{low} to {high}"
