"""What ``adsc account`` counted, as plain JSON types and as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from adsc_kernels.accounting import Account, ModelShape, Parts, StageAccount
from adsc_kernels.budget import BudgetSearch
from adsc_kernels.cli.text import in_bytes, in_macs, layer_range, saved, table
from adsc_kernels.schedule import CompressionSchedule

SHOWN = 6  # schedules of a budget that are written out
RANKING = (
    "nearest, then at most the budget, then stages of the most even depth, then the first boundary "
    "latest"
)
AVERAGES = (
    "processed: tokens that a layer sees. post-drop: tokens that leave it, so that a layer just "
    "before a boundary counts as if it had not seen what is dropped after it"
)


def describe(
    model: str,
    shape: ModelShape,
    text_tokens: int,
    dense: Account,
    accounts: list[tuple[CompressionSchedule, Account]],
    found: BudgetSearch | None,
) -> dict[str, Any]:
    """Everything, as plain JSON types."""
    tokens = _vision(dense)[0]
    facts: dict[str, Any] = {
        "model": {
            "name": model,
            "layers": shape.num_layers,
            "weight_bytes": _parts(dense.weight_bytes),
        },
        "prompt": {"text_tokens": text_tokens, "vision_tokens": tokens},
        "convention": asdict(dense.convention),
        "cache": asdict(dense.cache),
        "averages": AVERAGES,
        "dense": _describe(CompressionSchedule.dense(shape.num_layers), dense),
        "schedules": [_describe(schedule, kept) for schedule, kept in accounts],
    }
    if found is not None:
        facts["budget"] = {
            "asked": float(found.asked),
            "exact": found.exact,
            "ranking": RANKING,
            "schedules": [
                {"schedule": str(schedule), "average": float(average)}
                for schedule, average in zip(found.schedules, found.averages, strict=True)
            ],
        }
    return facts


def _describe(schedule: CompressionSchedule, counted: Account) -> dict[str, Any]:
    vision = _vision(counted)
    return {
        "schedule": str(schedule),
        "vision_tokens": list(vision),
        "average_processed": counted.average_processed,
        "average_post_drop": counted.average_post_drop,
        "stages": [
            _stage(stage, count) for stage, count in zip(counted.stages, vision, strict=True)
        ],
        "layers": [
            {
                "prefill_macs": _parts(layer.prefill),
                "decode_macs": _parts(layer.decode),
                "weight_bytes": _parts(layer.weight_bytes),
                "kv_prompt_bytes": layer.kv_prompt_bytes,
                "kv_bytes": layer.kv_bytes,
            }
            for layer in counted.layers
        ],
        "prefill_macs": _parts(counted.prefill),
        "decode_macs": _parts(counted.decode),
        "macs": counted.macs,
        "decoder_macs": counted.decoder_macs,
        "kv_prompt_bytes": counted.kv_prompt_bytes,
        "kv_bytes": counted.kv_bytes,
        "kv_peak_bytes": counted.kv_peak_bytes,
    }


def _stage(stage: StageAccount, vision: int) -> dict[str, Any]:
    return {
        "layers": list(stage.layers),
        "rows": stage.rows,
        "vision_tokens": vision,
        "prefill_macs": _parts(stage.prefill),
        "decode_macs": _parts(stage.decode),
        "weight_bytes": _parts(stage.weight_bytes),
        "kv_prompt_bytes": stage.kv_prompt_bytes,
        "kv_bytes": stage.kv_bytes,
    }


def _vision(counted: Account) -> tuple[int, ...]:
    assert counted.vision_tokens is not None  # `account` fills it in
    return counted.vision_tokens


def _parts(parts: Parts) -> dict[str, int]:
    return {**asdict(parts), "total": parts.total}


def as_text(facts: dict[str, Any], layers: bool) -> str:
    """The same for a person."""
    model, prompt, cache = facts["model"], facts["prompt"], facts["cache"]
    form = cache["dtype"]
    if cache["scale_bytes"]:
        form += f", {cache['scale_bytes']} bytes of scales a head's row"
    if cache["block_size"] > 1:
        form += f", blocks of {cache['block_size']}"
    head = [
        f"model     {model['name']}, {model['layers']} layers, "
        f"{in_bytes(model['weight_bytes']['total'])} of weights in 16 bits",
        f"prompt    {prompt['text_tokens']} text and {prompt['vision_tokens']} vision tokens",
        f"cache     {form}",
    ]
    parts = ["\n".join(head)]
    if "budget" in facts:
        parts.append(_budget(facts["budget"]))
    schedules = facts["schedules"]
    if len(schedules) == 1:
        parts += [_stages(facts["dense"], schedules[0]), _by_part(facts)]
    else:
        parts.append(_comparison([facts["dense"], *schedules]))
    if layers:
        parts += [_layers(one) for one in schedules]
    if "conventions" in facts:
        parts.append(_conventions(facts["conventions"], schedules))
    parts.append(
        f"MACs by the convention {facts['convention']['name']}: "
        f"{facts['convention']['definition']}.\nAverages: {facts['averages']}."
    )
    if "plot" in facts:
        parts.append(f"drawn in {facts['plot']}")
    return "\n\n".join(parts)


def _budget(budget: dict[str, Any]) -> str:
    schedules, asked = budget["schedules"], f"{budget['asked']:.6g}"
    alone = len(schedules) == 1
    many = "1 schedule" if alone else f"{len(schedules)} schedules"
    if budget["exact"]:
        first = f"budget    {asked}: {many} average{'s' * alone} exactly that"
    else:
        first = f"budget    {asked}: none averages exactly that; {many} come{'s' * alone} nearest"
    lines = [f"{first}, best first ({budget['ranking']})"]
    for one in schedules[:SHOWN]:
        lines.append(f"          {one['schedule']}  averages {one['average']:g}")
    if len(schedules) > SHOWN:
        lines.append(f"          and {len(schedules) - SHOWN} more (--json lists them)")
    return "\n".join(lines)


def _macs(one: dict[str, Any]) -> int:
    """Of a layer or a stage."""
    return int(one["prefill_macs"]["total"] + one["decode_macs"]["total"])


def _stages(dense: dict[str, Any], kept: dict[str, Any]) -> str:
    whole = dense["layers"][0]  # every dense layer is like the others
    rows = []
    for index, stage in enumerate(kept["stages"]):
        depth = len(stage["layers"])
        rows.append(
            [
                f"stage {index}",
                layer_range(range(stage["layers"][0], stage["layers"][-1] + 1))
                if depth
                else "none",
                str(stage["vision_tokens"]),
                *_pair(depth * _macs(whole), _macs(stage), in_macs),
                *_pair(depth * whole["kv_bytes"], stage["kv_bytes"], in_bytes),
            ]
        )
    average = f"mean {kept['average_processed']:g}"
    macs = _pair(dense["decoder_macs"], kept["decoder_macs"], in_macs)
    resident = _pair(dense["kv_bytes"], kept["kv_bytes"], in_bytes)
    peak = _pair(dense["kv_peak_bytes"], kept["kv_peak_bytes"], in_bytes)
    rows.append(["decoder", "all", average, *macs, *resident])
    rows.append(["model", "", "", *_pair(dense["macs"], kept["macs"], in_macs), *resident])
    rows.append(["cache peak", "", "", "", "", "", *peak])
    title = (
        f"schedule  {kept['schedule'] or 'dense'}\n"
        f"          vision tokens on average: {kept['average_processed']:g} processed, "
        f"{kept['average_post_drop']:g} post-drop\n\n"
    )
    header = ["", "layers", "vision", "MACs dense", "compressed", "saved"]
    return title + table([*header, "cache dense", "compressed", "saved"], rows, left=2)


def _by_part(facts: dict[str, Any]) -> str:
    """MACs by part, prefill and decoded tokens, and what each part holds."""
    dense, kept = facts["dense"], facts["schedules"][0]
    passes = ["prefill"] + ["decode"] * (dense["decode_macs"]["total"] > 0)
    rows = []
    for part, weights in facts["model"]["weight_bytes"].items():
        cells = []
        for name in passes:
            before, after = dense[f"{name}_macs"][part], kept[f"{name}_macs"][part]
            cells += _pair(before, after, in_macs) if before else ["", "", ""]
        rows.append([part, *cells, in_bytes(weights) if weights else ""])
        if part == "scores":
            rows[-1][-1] = f"{in_bytes(kept['kv_bytes'])} of KV"
    columns = [cell for name in passes for cell in (f"{name} dense", "compressed", "saved")]
    return table(["MACs by part", *columns, "weights"], rows)


def _comparison(every: list[dict[str, Any]]) -> str:
    dense = every[0]
    rows = [
        [
            one["schedule"] or "dense",
            " ".join(map(str, one["vision_tokens"])),
            f"{one['average_processed']:g}",
            f"{one['average_post_drop']:g}",
            *_pair(dense["macs"], one["macs"], in_macs)[1:],
            *_pair(dense["kv_bytes"], one["kv_bytes"], in_bytes)[1:],
            in_bytes(one["kv_peak_bytes"]),
        ]
        for one in every
    ]
    header = ["schedule", "vision tokens", "processed", "post-drop", "MACs", "saved"]
    return table([*header, "cache", "saved", "cache peak"], rows, left=2)


def _layers(one: dict[str, Any]) -> str:
    rows = []
    for stage in one["stages"]:
        for layer in stage["layers"]:
            cost = one["layers"][layer]
            counts = [
                cost["prefill_macs"][part] + cost["decode_macs"][part]
                for part in ("projections", "scores", "ffn", "norms", "total")
            ]
            macs = [in_macs(count) if count else "" for count in counts]
            held = [in_bytes(cost["weight_bytes"]["total"]), in_bytes(cost["kv_bytes"])]
            rows.append([str(layer), str(stage["vision_tokens"]), *macs, *held])
    header = ["layer", "vision", "projections", "scores", "FFN", "norms", "MACs"]
    return f"{one['schedule'] or 'dense'}\n{table([*header, 'weights', 'cache'], rows, left=0)}"


def _conventions(every: list[dict[str, Any]], schedules: list[dict[str, Any]]) -> str:
    rows = [
        [
            how["name"],
            in_macs(how["dense_macs"]),
            *(cell for macs in how["macs"] for cell in _pair(how["dense_macs"], macs, in_macs)[1:]),
        ]
        for how in every
    ]
    header = ["convention", "MACs dense"]
    for one in schedules:
        header += [one["schedule"] or "dense", "saved"]
    meanings = "\n".join(f"{how['name']}: {how['definition']}" for how in every)
    return f"{table(header, rows)}\n\n{meanings}"


def _pair(before: int, after: int, unit: Any) -> list[str]:
    return [unit(before), unit(after), saved(before, after)]
