"""What was measured, as text and as a file that is written anew with every case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adsc_kernels.cli.text import in_bytes, table

HEADS = [
    "way", "average", "first token, ms", "ms per token", "tokens/s", "cache", "peak memory",
    "device, ms", "launches", "outside", "step on device, ms", "launches",
]  # fmt: skip
LARGEST = ["way", "batch", "ms per token", "tokens/s", "cache", "peak memory"]
NONE = "-"


def write(found: dict[str, Any], file: Path) -> None:
    """Whole, by a name of its own first: who reads it meanwhile finds the one before."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(file)


def text_of(rows: list[dict[str, Any]]) -> str:
    """The rows of one case."""
    first = rows[0]
    head = f"{first['vision_tokens']} + {first['text_tokens']} tokens, {first['new_tokens']} new"
    if "memory_bytes" in first:
        lines = [_largest(row) for row in rows]
        return f"{head}, in {in_bytes(first['memory_bytes'])}:\n{table(LARGEST, lines)}"
    lines = [_line(row) for row in rows]
    return f"batch {first['batch']}, {head}:\n{table(HEADS, lines)}"


def _line(row: dict[str, Any]) -> list[str]:
    prompt, step, outside = row["prefill"], row["step"], row["share_outside"]
    return [
        row["way"],
        f"{row['average_tokens']:g}",
        f"{row['ttft_ms']:.1f}",
        _number(row["ms_per_token"], 2),
        _number(row["tokens_per_second"], 0),
        _bytes(row["cache_bytes"]),
        _bytes(row["peak_bytes"]),
        _number(prompt.get("ms"), 2),
        _number(prompt.get("launches"), 0),
        NONE if outside is None else f"{100 * outside:.1f} %",
        _number(step.get("ms"), 2),
        _number(step.get("launches"), 0),
    ]


def _largest(row: dict[str, Any]) -> list[str]:
    return [
        row["way"],
        str(row["batch"]),
        f"{row['ms_per_token']:.2f}",
        f"{row['decode_tokens_per_second']:.0f}",
        in_bytes(row["cache_bytes"]),
        _bytes(row["peak_bytes"]),
    ]


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _bytes(value: int | None) -> str:
    return NONE if value is None else in_bytes(value)
