"""What whole prompts and answers were aimed at, held against what was measured of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
PICTURE = 576


@dataclass(frozen=True)
class Aim:
    """Of one figure: what it is, what was wanted, what came, and whether that is as wanted."""

    what: str
    wanted: str
    got: str
    met: bool


def at_least(what: str, aim: float, got: float, unit: str = " ×") -> Aim:
    return Aim(what, f"at least {aim:g}{unit}", f"{got:.2f}{unit}", got >= aim)


def at_most(what: str, aim: float, got: float, unit: str, digits: int = 2) -> Aim:
    return Aim(what, f"at most {aim:g}{unit}", f"{got:.{digits}f}{unit}", got <= aim)


def prompts_of(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "memory_bytes" not in row]


def by_case(rows: list[Row]) -> dict[tuple[int, int], dict[str, Row]]:
    """Of vision tokens and batch, the ways; the first row of each, whatever the answers' length."""
    cases: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["vision_tokens"], row["batch"]), {}).setdefault(row["way"], row)
    return dict(sorted(cases.items()))


def aims(rows: list[Row]) -> list[Aim]:
    """Those of which the rows say something."""
    largest: dict[int, dict[str, Row]] = {}
    for row in rows:
        if "memory_bytes" in row:
            largest.setdefault(row["vision_tokens"], {})[row["way"]] = row
    found = []
    for (vision, batch), ways in by_case(prompts_of(rows)).items():
        case = f"batch {batch}, {vision} tokens"
        found += [*prompts(case, batch, vision, ways), *on_device(case, ways)]
        found += decoding(case, batch, vision, ways)
    for vision, ways in sorted(largest.items()):
        found += at_the_largest(f"{vision} tokens", ways)
    return found


def prompts(case: str, batch: int, vision: int, ways: dict[str, Row]) -> Iterator[Aim]:
    dense, fewer = ways.get("dense"), ways.get("192")
    if dense and fewer and vision == PICTURE:
        gained = dense["ttft_ms"] / fewer["ttft_ms"]
        if batch == 1:
            yield at_least(f"{case}: 192, times as fast as dense", 1.7, gained)
        else:
            promised = dense["prefill_macs"] / fewer["prefill_macs"]
            yield at_least(
                f"{case}: 192, of the {promised:.2f} × that MACs promise",
                97,
                100 * gained / promised,
                " %",
            )
    if dense and (theirs := ways.get("transformers")):
        aim = 1.8 if batch == 1 else 1.0
        yield at_least(
            f"{case}: dense, times as fast as transformers",
            aim,
            theirs["ttft_ms"] / dense["ttft_ms"],
        )
    for name, rival in (("FastV", "fastv"), ("PyramidDrop", "pyramid_drop")):
        if fewer and rival in ways:
            gained = ways[rival]["ttft_ms"] / fewer["ttft_ms"]
            yield at_least(f"{case}: 192, times as fast as {name}", 1.0, gained)


def on_device(case: str, ways: dict[str, Row]) -> Iterator[Aim]:
    for name in ("dense", "192"):
        if (row := ways.get(name)) and row["prefill"]:
            yield at_most(
                f"{case}: {name}, device time outside GEMM and attention",
                8,
                100 * row["share_outside"],
                " %",
                1,
            )
            if name != "dense":
                share = row["prefill"]["by_kind"].get("boundary", 0.0) / row["prefill"]["ms"]
                yield at_most(f"{case}: {name}, boundaries", 0.5, 100 * share, " %")


def decoding(case: str, batch: int, vision: int, ways: dict[str, Row]) -> Iterator[Aim]:
    for name in ("dense", "192"):
        if (row := ways.get(name)) and row["step"] and row["ms_per_token"]:
            wall = row["ms_per_token"] / row["step"]["ms"]
            yield at_most(f"{case}: {name}, a step's wall over device time", 1.1, wall, " ×")
            yield at_most(f"{case}: {name}, launches a step", 400, row["step"]["launches"], "", 0)
    dense, fewer = ways.get("dense"), ways.get("192")
    if dense and fewer and vision == 5 * PICTURE and fewer["ms_per_token"]:
        gained = dense["ms_per_token"] / fewer["ms_per_token"]
        yield at_least(f"{case}: 192, dense's time per token over its own", 1.35, gained)


def at_the_largest(case: str, ways: dict[str, Row]) -> Iterator[Aim]:
    dense, fewer = ways.get("dense"), ways.get("192")
    if dense and fewer:
        yield at_least(
            f"{case}: 192, times the largest batch", 2.2, fewer["batch"] / dense["batch"]
        )
        gained = fewer["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
        yield at_least(f"{case}: 192, times the tokens/s at the largest batch", 2.0, gained)
