"""The pages' words and tables about whole prompts and answers, of what `adsc bench e2e` wrote."""
# ruff: noqa: E501 (sentences of those pages)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reach_e2e import Row, aims, by_case, prompts_of
from table_gpu import Report, Results, stamp_of, table

UNRUN = "**End to end**: unrun; `adsc bench e2e --headline --shape llava-1.5-7b --out FILE` measures it."
NAMES = {
    "before": "dropped before the decoder",
    "smaller": "smaller picture",
    "fastv": "FastV",
    "pyramid_drop": "PyramidDrop",
}
ORDER = ("dense", "192", "128", "64", *NAMES, "transformers")
KINDS = {
    "gemm": "GEMM",
    "attention": "attention",
    "norm": "norms",
    "pointwise": "RoPE, SiLU",
    "boundary": "boundaries",
    "other": "other",
}
GIB = 2**30


def reports_of(results: Results) -> list[Report]:
    """One for each model, that with most rows first; by the later where two have a row."""
    found: dict[str, Report] = {}
    for report in results.get("gpu-e2e", []):
        before = found.get(report["model"], {"rows": [], "left_out": []})
        rows = {key_of(row): row for row in (*before["rows"], *report["rows"])}
        left_out = [*before["left_out"], *report["left_out"]]
        found[report["model"]] = {
            **report,
            "rows": sorted(rows.values(), key=place_of),
            "left_out": left_out,
        }
    return sorted(found.values(), key=lambda report: -len(report["rows"]))


def key_of(row: Row) -> tuple[Any, ...]:
    """What is measured; a largest batch is a measurement of its memory."""
    size = row.get("memory_bytes") or -row["batch"]
    return row["vision_tokens"], row["new_tokens"], size, row["way"]


def place_of(row: Row) -> tuple[Any, ...]:
    return row["vision_tokens"], row["batch"], row["new_tokens"], ORDER.index(row["way"])


def ways_in(rows: list[Row]) -> list[str]:
    return sorted({row["way"] for row in rows}, key=ORDER.index)


# ---- README.md ----


def headline(results: Results) -> str:
    reports = reports_of(results)
    if not reports:
        return UNRUN
    report = reports[0]
    rows = [
        row
        for row in prompts_of(report["rows"])
        if row["way"] in ("dense", "192", "64", "transformers")
    ]
    return "\n\n".join([
        f"**End to end** ({stamp_of(report)}): {report['model']}, random weights, {report['dtype'].removeprefix('torch.')}, "
        "prompts of one picture and 101 tokens of text. First token, ms, and times as fast as our own dense:",
        first_tokens(rows),
        "All of it, decoding, the largest batch and where the time goes: [docs/performance.md](docs/performance.md).",
    ])  # fmt: skip


def first_tokens(rows: list[Row]) -> str:
    ways, lines = ways_in(rows), []
    for (vision, batch), found in by_case(rows).items():
        dense = found.get("dense")
        cells = [speed(found.get(way), dense) for way in ways]
        lines.append([vision, batch, *cells])
    heads = [NAMES.get(way, way) for way in ways]
    return table(["vision tokens", "batch", *heads], lines)


def speed(row: Row | None, dense: Row | None) -> str:
    if row is None:
        return "–"
    ms = row["ttft_ms"]
    known = dense is not None and row is not dense
    return f"{ms:.1f} ({dense['ttft_ms'] / ms:.2f} ×)" if known and dense else f"{ms:.1f}"


# ---- docs/performance.md ----


def all_rows(results: Results) -> str:
    return "\n\n".join(map(of_model, reports_of(results))) or UNRUN


def of_model(report: Report) -> str:
    rows = prompts_of(report["rows"])
    largest = [row for row in report["rows"] if "memory_bytes" in row]
    parts = [
        f"**{report['model']}**, random weights, {report['dtype'].removeprefix('torch.')} ({stamp_of(report)}).",
        "First token, ms of wall time from the packed rows on, and how many times as fast as our own dense:",
        first_tokens(rows),
        "Where the device's time of a prompt goes, ms, beside the wall time and the host's launches:",
        device_times(rows),
        "A step of decode:",
        steps(rows),
    ]
    if largest:
        parts += [
            "The largest batch that fits, by the accounting, its cache allocated; steps of decode alone:",
            largest_batches(largest),
        ]
    parts += ["What was aimed at:", aimed(report)]
    if report["left_out"]:
        said = "; ".join(
            f"{left['way']} at batch {left['batch']} ({left['reason']})"
            for left in report["left_out"]
        )
        parts.append(f"Left out: {said}.")
    return "\n\n".join(parts)


def device_times(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if not row["prefill"]:
            continue
        kinds = row["prefill"]["by_kind"]
        # Copies are few and short; they count with what has no kind of its own.
        ms = {
            kind: kinds.get(kind, 0.0) + (kinds.get("copy", 0.0) if kind == "other" else 0.0)
            for kind in KINDS
        }
        lines.append([
            row["vision_tokens"], row["batch"], NAMES.get(row["way"], row["way"]),
            *(f"{ms[kind]:.2f}" for kind in KINDS), f"{row['prefill']['ms']:.2f}", f"{row['ttft_ms']:.2f}",
            f"{row['prefill']['launches']:.0f}", f"{100 * row['share_outside']:.1f} %",
        ])  # fmt: skip
    heads = [
        "vision tokens",
        "batch",
        "way",
        *KINDS.values(),
        "device",
        "wall",
        "launches",
        "outside GEMM and attention",
    ]
    return table(heads, lines)


def steps(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["ms_per_token"] is None:
            continue
        step = row["step"]
        lines.append([
            row["vision_tokens"], row["batch"], row["new_tokens"], NAMES.get(row["way"], row["way"]), f"{row['ms_per_token']:.2f}",
            *said(step, lambda step: [f"{step['ms']:.2f}", f"{step['by_kind'].get('attention', 0):.2f}", f"{step['launches']:.0f}"], 3),
            f"{row['tokens_per_second']:.0f}", f"{row['cache_bytes'] / GIB:.2f}",
            *said(row["peak_bytes"], lambda peak: [f"{peak / GIB:.1f}"], 1),
        ])  # fmt: skip
    heads = [
        "vision tokens",
        "batch",
        "new tokens",
        "way",
        "ms per token",
        "ms on the device",
        "of it attention",
        "launches",
        "tokens/s with the prompt",
        "cache, GiB",
        "peak memory, GiB",
    ]
    return table(heads, lines)


def said(found: Any, how: Callable[[Any], list[str]], cells: int) -> list[str]:
    return how(found) if found else ["–"] * cells


def largest_batches(rows: list[Row]) -> str:
    lines = [
        [
            row["vision_tokens"], row["memory_bytes"] // GIB, NAMES.get(row["way"], row["way"]), row["batch"],
            f"{row['ms_per_token']:.2f}", f"{row['decode_tokens_per_second']:.0f}", f"{row['cache_bytes'] / GIB:.1f}",
            *said(row["peak_bytes"], lambda peak: [f"{peak / GIB:.1f}"], 1),
        ]
        for row in rows
    ]  # fmt: skip
    heads = [
        "vision tokens",
        "memory, GiB",
        "way",
        "batch",
        "ms per token",
        "tokens/s",
        "cache, GiB",
        "peak memory, GiB",
    ]
    return table(heads, lines)


def aimed(report: Report) -> str:
    lines = [
        [aim.what, aim.wanted, aim.got, "yes" if aim.met else "**no**"]
        for aim in aims(report["rows"])
    ]
    return table(["what", "aim", "measured", "met"], lines)
