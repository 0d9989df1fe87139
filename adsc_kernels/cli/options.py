"""What the commands' options are made of: numbers with bounds, schedules, devices, progress.

An ``ArgumentTypeError`` here is said at once, by the option's name; nothing imports torch before
its device is asked for.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adsc_kernels import checks
from adsc_kernels.budget import PRESETS
from adsc_kernels.hub import bundled_checkpoint, find_folder
from adsc_kernels.schedule import CompressionSchedule

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MOST_ROWS = 2**16  # of a grid: each may be a segment of its own
DEFAULT_LAYERS = 32
DTYPES = ("float32", "float16", "bfloat16")
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_DECIMAL = re.compile(r"-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e-?[0-9]{1,2})?")
_TOKENS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9}|/[0-9]{1,9})?")


def integer(least: int, most: int = checks.INT32_MAX) -> Callable[[str], int]:
    """An option's type: a whole number in these bounds, in ASCII digits."""

    def read(text: str) -> int:
        if _INTEGER.fullmatch(text) is None or not least <= int(text) <= most:
            upper = {checks.INT32_MAX: "2^31 - 1", checks.INT64_MAX: "2^63 - 1"}.get(most, most)
            raise ArgumentTypeError(
                f"expected a whole number from {least} to {upper}, got {checks.shown(text)}"
            )
        return int(text)

    return read


count = integer(0)


def decimal(text: str) -> float:
    """A number such as 0.7 or 1e-3."""
    if _DECIMAL.fullmatch(text) is None:
        raise ArgumentTypeError(f"expected a number such as 0.7, got {checks.shown(text)}")
    return float(text)


def tokens(text: str) -> Fraction:
    """A number of tokens, exactly: 192, 128.5 or 577/3."""
    if _TOKENS.fullmatch(text) is None or re.search("/0+$", text):
        raise ArgumentTypeError(f"expected a number of tokens, got {checks.shown(text)}")
    return Fraction(text)


def size(text: str) -> tuple[int, ...]:
    """``576`` to (576,), ``24x24`` to (576, 24, 24)."""
    sides = tuple(count(side) for side in text.split("x", 1))
    if len(sides) == 1:
        return sides
    if sides[0] > MOST_ROWS:
        raise ArgumentTypeError(f"expected at most {MOST_ROWS} rows, got {sides[0]}")
    return (count(str(sides[0] * sides[1])), *sides)


def schedule(text: str, num_layers: int | None = None) -> CompressionSchedule:
    """A schedule by its text, for so many layers, or by a preset's name, which knows its own."""
    if text in PRESETS:
        found = CompressionSchedule.preset(text)
        if num_layers not in (None, found.num_layers):
            raise ValueError(
                f"schedule: expected one for {num_layers} layers, got {found.num_layers} by "
                f"{text!r}"
            )
        return found
    return CompressionSchedule.parse(text, DEFAULT_LAYERS if num_layers is None else num_layers)


def device(name: str | None) -> torch.device:
    """``--device``: one that can be used here and holds values; CUDA where there is one."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    found = checks.usable_device("--device", name)
    if found.type == "meta":
        raise ValueError("--device: expected one that holds values, got 'meta'")
    return found


def dtype(name: str | None, device: torch.device) -> torch.dtype:
    """``--dtype``: one of :data:`DTYPES`; float16 on a GPU, else float32."""
    import torch

    chosen: torch.dtype = getattr(
        torch, name or ("float16" if device.type == "cuda" else "float32")
    )
    return chosen


def progress(steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The same steps with a bar on stderr, where that is a terminal."""
    return bar(what, total, steps)


def bar(what: str, total: int | None = None, steps: Iterable[Any] | None = None) -> Any:
    """tqdm's bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    hidden = True if sys.stderr is None else None  # None: tqdm asks whether it is a terminal
    return tqdm(steps, what, total, leave=False, disable=hidden, dynamic_ncols=True)


def model_folder(path_or_id: str | None) -> Path:
    """Of `--model`, which is the bundled checkpoint where it isn't given; FileNotFoundError."""
    return find_folder(bundled_checkpoint() if path_or_id is None else path_or_id)
