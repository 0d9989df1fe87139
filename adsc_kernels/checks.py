"""The one entry check: what users give is looked at here, and every error reads alike.

Each check takes the argument's name and its value, returns the value, and raises ``TypeError`` for
the wrong type or ``ValueError`` for the wrong value: name, what was expected, what came. A bool is
no int, and an int is never made of a float. Nothing heavy is imported: torch only by those checks
that are about tensors.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def shown(value: object, most: int = 60) -> str:
    """A value for an error's text: cut where it is long, and said in words where it can't be."""
    try:
        text = str(value) if isinstance(value, Fraction) else repr(value)
    except Exception:  # an int of more digits than Python writes, or an object's own fault
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def kind(value: object) -> str:
    """A type's name for an error's text."""
    return "None" if value is None else type(value).__name__


def instance(name: str, value: Any, expected: type[T], words: str = "") -> T:
    """A value of a class; ``words`` in place of the class's name."""
    if not isinstance(value, expected):
        article = "an" if expected.__name__[0] in "aeiouAEIOU" else "a"
        words = words or f"{article} {expected.__name__}"
        raise TypeError(f"{name}: expected {words}, got {kind(value)}")
    return value


def integer(name: str, value: Any, least: int | None = None, most: int | None = INT64_MAX) -> int:
    """An int, no bool, from ``least`` to ``most``. A size that torch traces passes unread."""
    if type(value) is not int:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.SymInt):
            return value  # its range is not known yet
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {shown(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {_power(most)}, got {shown(value)}")
    return value


def _power(most: int) -> str:
    return {INT32_MAX: "2^31 - 1", INT64_MAX: "2^63 - 1"}.get(most, str(most))


def at_least(least: int, **counts: Any) -> None:
    """Several ints with one bound, named as they are given."""
    for name, count in counts.items():
        integer(name, count, least)


def number(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> float | Fraction:
    """A finite int, float or fraction: at least ``least``, at most ``most``, above ``above``."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least:g}, got {shown(value)}")
    if above is not None and value <= above:
        raise ValueError(f"{name}: expected above {above:g}, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most:g}, got {shown(value)}")
    return value


def choice(name: str, value: Any, choices: Iterable[T]) -> T:
    """One of some names."""
    choices = tuple(choices)
    # By type first: a tensor or an array answers `==` with anything but a bool.
    error = ValueError if value is None or isinstance(value, str) else TypeError
    if error is TypeError or value not in choices:
        *others, last = map(repr, choices)
        got = shown(value)
        raise error(f"{name}: expected one of {', '.join(others)} or {last}, got {got}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False themselves."""
    return instance(name, value, bool, "True or False")


def sequence(name: str, value: Any, expected: type[T], words: str = "") -> tuple[T, ...]:
    """A list or tuple whose members are of one class; ``words`` in place of "a list of" it."""
    words = words or ("a list" if expected is object else f"a list of {expected.__name__}")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name}: expected {words}, got {kind(value)}")
    for at, member in enumerate(value):
        if not isinstance(member, expected):
            raise TypeError(f"{name}: expected {words}, got {kind(member)} at {at}")
    return tuple(value)


def pair(name: str, value: Any, least: int, parts: tuple[str, str]) -> tuple[int, int]:
    """Two ints such as (height, width), whose names are ``parts``."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name}: expected ({', '.join(parts)}), got {shown(value)}")
    first, second = (
        integer(f"{name}_{part}", side, least) for part, side in zip(parts, value, strict=True)
    )
    return first, second


def path(name: str, value: Any) -> Path:
    """A path on disk, of which nothing is asked but that the system can take it."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: expected a path, got {kind(value)}")
    found = Path(value)
    if not os.fspath(value) or "\0" in os.fspath(found):
        raise ValueError(f"{name}: expected a path, got {shown(value)}")
    return found


def device(name: str, value: Any) -> torch.device:
    """A torch.device, or the text of one."""
    import torch

    if isinstance(value, torch.device):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a torch.device or a str, got {shown(value)}")
    try:
        return torch.device(value)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a device such as 'cpu' or 'cuda:0', got {shown(value)}"
        ) from None


def usable_device(name: str, value: Any) -> torch.device:
    """:func:`device`, of which a tensor can be made here; ``ValueError`` with torch's reason."""
    import torch

    found = device(name, value)
    if found.type not in ("cpu", "meta"):
        try:
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{name}: {str(found)!r} can't be used here ({reason})") from None
    return found


def dtype(name: str, value: Any, allowed: Sequence[torch.dtype] = ()) -> torch.dtype:
    """A torch.dtype, one of ``allowed`` where any are given."""
    import torch

    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {shown(value)}")
    if allowed and value not in allowed:
        expected = " or ".join(map(str, allowed))
        raise TypeError(f"{name}: expected {expected}, got {value}")
    return value


def tensor(name: str, value: Any) -> torch.Tensor:
    """A strided tensor of plain elements: not sparse, not nested, not quantized."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {kind(value)}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a strided tensor, got layout {value.layout}")
    if value.is_quantized:
        raise TypeError(f"{name}: expected plain elements, got a quantized tensor, {value.dtype}")
    return value


def has(name: str, value: Any, expected: str, fields: Sequence[str]) -> None:
    """A structural check: what these fields are read of, such as a stage."""
    for field in fields:
        if not hasattr(value, field):
            raise TypeError(f"{name}: expected {expected}, got {kind(value)}")


def stage(name: str, value: Any) -> Any:
    """A StagePlan, or what has the fields that say where a stage's rows come from."""
    fields = ("segments", "num_tokens", "num_tokens_in")
    has(name, value, "a stage such as plan.stages[1]", fields)
    return value
