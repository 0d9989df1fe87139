"""Where vision tokens are dropped and how many stay: the schedule. No tensors here.

The kept count at a boundary is ``m = ceil(n * keep)`` with an exact fraction; which of the ``n``
tokens stay is the keep rule of ``csrc/segment.h`` (ADSC, arXiv 2602.12618, drops a fixed share,
uniformly; the layers, ratios and pattern are configuration).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from adsc_kernels import checks
from adsc_kernels.segment_table import PATTERN_CODES

PATTERNS = tuple(PATTERN_CODES)
POSITIONS = ("original", "renumber")
CONFIG_KEY = "adsc_schedule"  # of a model's config

MAX_LAYERS = 10_000  # no decoder is as deep; what lists layers stays quick and small
# Numerators and denominators stay below 2^31 so that count * numerator fits 64 bits.
_MAX_TERM = 2**31
# Digits are ASCII: str() of what other scripts' digits parse to would be another text. Runs are
# bounded, since Python refuses to read an int of thousands of digits, and takes long over many.
_DIGITS = r"[0-9]{1,40}(?![0-9])"
_NUMBER = re.compile(rf"{_DIGITS}(?:/{_DIGITS}|\.{_DIGITS})?|\.{_DIGITS}")
_LAYER = re.compile(_DIGITS)


@dataclass(frozen=True)
class Boundary:
    """Before decoder layer ``layer`` (0-based), keep this share of each image's tokens.

    ``keep_rows`` and ``keep_columns`` are the two factors of ``keep`` under the grid pattern, and
    ``None`` under the others.
    """

    layer: int
    keep: Fraction
    keep_rows: Fraction | None = None
    keep_columns: Fraction | None = None

    def __post_init__(self) -> None:
        checks.integer("boundary layer", self.layer)
        where = f"keep at layer {self.layer}"
        if (self.keep_rows is None) != (self.keep_columns is None):
            raise ValueError(f"{where}: expected keep_rows and keep_columns, or neither, got one")
        for share in (self.keep, *self.factors):
            # A float is not exact, and would be written as what no schedule parses.
            if isinstance(share, bool) or not isinstance(share, Fraction | int):
                raise TypeError(f"{where}: expected a Fraction, got {checks.shown(share)}")
            if not 0 <= share <= 1:
                got = checks.shown(share)
                raise ValueError(f"{where}: expected a share in [0, 1], got {got}")
            if share.denominator >= _MAX_TERM:
                raise ValueError(f"{where}: expected a denominator below 2^31, got {share}")
        if self.keep != prod(self.factors):
            raise ValueError(
                f"{where}: expected keep_rows * keep_columns = {prod(self.factors)}, "
                f"got {checks.shown(self.keep)}"
            )

    def __str__(self) -> str:
        return f"{self.layer}:{self.share()}"

    @property
    def factors(self) -> tuple[Fraction, ...]:
        """The shares that the rule applies: ``keep`` alone, or that of rows and that of columns."""
        if self.keep_rows is None or self.keep_columns is None:
            return (self.keep,)
        return self.keep_rows, self.keep_columns

    def share(self) -> str:
        """The keep share as text: ``1/4``, or rows x columns as ``1/2x1/2``."""
        return "x".join(map(str, self.factors))


@dataclass(frozen=True)
class CompressionSchedule:
    """The boundaries of a decoder of ``num_layers`` layers, in order; without any it is dense.

    Make one with :meth:`parse`, :meth:`from_dict` or :meth:`dense`. Equal schedules compare and
    hash equal; ``str(schedule)`` parses back to it.
    """

    num_layers: int
    boundaries: tuple[Boundary, ...] = ()
    pattern: str = "start"
    positions: str = "original"

    def __post_init__(self) -> None:
        checks.integer("num_layers", self.num_layers, 1, MAX_LAYERS)
        checks.choice("pattern", self.pattern, PATTERNS)
        checks.choice("positions", self.positions, POSITIONS)
        given = checks.sequence("boundaries", self.boundaries, Boundary)
        object.__setattr__(self, "boundaries", tuple(sorted(given, key=lambda b: b.layer)))
        before = -1
        for boundary in self.boundaries:
            if not 0 <= boundary.layer < self.num_layers:
                raise ValueError(
                    f"boundary layer: expected 0 to {self.num_layers - 1} for a decoder of "
                    f"{self.num_layers} layers, got {boundary.layer}"
                )
            if boundary.layer == before:
                raise ValueError(f"boundary layer: each layer at most once, got {before} twice")
            before = boundary.layer
            self._check_keep(boundary)

    def _check_keep(self, boundary: Boundary) -> None:
        if len(boundary.factors) != (2 if self.pattern == "grid" else 1):
            raise ValueError(
                f"keep at layer {boundary.layer}: pattern 'grid' takes rows x columns such as "
                f"1/2x1/2 and the others one share such as 1/4, got {boundary.share()!r} with "
                f"pattern {self.pattern!r}"
            )

    @classmethod
    def dense(cls, num_layers: int) -> CompressionSchedule:
        """The schedule that drops nothing."""
        return cls(num_layers)

    @classmethod
    def parse(cls, text: str, num_layers: int) -> CompressionSchedule:
        """Read ``layer:keep[,layer:keep...][@pattern][@positions]``; an empty text is dense.

        ``keep`` is a fraction or a decimal (``1/4``, ``0.25``), read exactly; under ``@grid`` two
        of them for rows and columns (``1/2x1/2``). Raises ``ValueError`` that says at which
        character the text stops making sense, or which boundary is out of range.
        """
        return _Parser(checks.instance("schedule", text, str)).schedule(num_layers)

    @classmethod
    def for_budget(
        cls,
        average_tokens: int | float | Fraction,
        vision_tokens: int,
        num_layers: int,
        num_boundaries: int,
        **options: Any,
    ) -> CompressionSchedule:
        """The best schedule whose layers process ``average_tokens`` of ``vision_tokens`` on
        average, or as near to that as can be, with one keep share at ``num_boundaries`` boundaries.

        ``options`` (other shares or mixed ones, allowed layers, whole cache blocks, ``exact``,
        pattern, positions), the ranking and the errors are those of
        :func:`adsc_kernels.budget.search`, which lists all that are as near.
        """
        from adsc_kernels.budget import search

        found = search(average_tokens, vision_tokens, num_layers, num_boundaries, **options)
        return found.schedules[0]

    @classmethod
    def preset(cls, name: str) -> CompressionSchedule:
        """A schedule of :data:`adsc_kernels.budget.PRESETS`: ``llava-1.5-7b/192``, ``/128``,
        ``/64`` and the same of ``llava-1.5-13b``, by the tokens of 576 that a layer processes on
        average.
        """
        from adsc_kernels.budget import PRESETS

        num_layers, text = PRESETS[checks.choice("preset", name, PRESETS)]
        return cls.parse(text, num_layers)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionSchedule:
        """The inverse of :meth:`to_dict`; unknown or missing keys raise ``ValueError``."""
        if not isinstance(data, Mapping):
            raise TypeError(f"schedule: expected a mapping, got {checks.kind(data)}")
        unknown = set(data) - {"num_layers", "boundaries", "pattern", "positions"}
        if unknown or "num_layers" not in data:
            raise ValueError(
                "schedule: expected the keys num_layers, boundaries, pattern, positions, "
                f"got {checks.shown(list(data))}"
            )
        boundaries = []
        for entry in checks.sequence("boundaries", data.get("boundaries", ()), object):
            if not isinstance(entry, Mapping) or set(entry) != {"layer", "keep"}:
                got = checks.shown(entry)
                raise ValueError(f"boundaries: expected {{'layer', 'keep'}} entries, got {got}")
            boundaries.append(
                parse_share(entry["keep"], checks.integer("boundary layer", entry["layer"]))
            )
        return cls(
            data["num_layers"],
            tuple(boundaries),
            data.get("pattern", "start"),
            data.get("positions", "original"),
        )

    @classmethod
    def of_config(cls, kept: object, num_layers: int) -> CompressionSchedule:
        """What a model's config holds under ``CONFIG_KEY``: text, or what :meth:`to_dict` made.

        Raises ``ValueError`` for anything else, and for a schedule of another depth.
        """
        if isinstance(kept, str):
            return cls.parse(kept, num_layers)
        if not isinstance(kept, Mapping):
            got = checks.shown(kept)
            raise ValueError(f"{CONFIG_KEY}: expected text or a mapping, got {got}")
        schedule = cls.from_dict(kept)
        if schedule.num_layers != num_layers:
            raise ValueError(
                f"{CONFIG_KEY}: expected a schedule for {num_layers} layers, "
                f"got {schedule.num_layers}"
            )
        return schedule

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: shares are exact, as text."""
        return {
            "num_layers": self.num_layers,
            "boundaries": [{"layer": b.layer, "keep": b.share()} for b in self.boundaries],
            "pattern": self.pattern,
            "positions": self.positions,
        }

    def __str__(self) -> str:
        text = ",".join(str(b) for b in self.boundaries)
        if self.pattern != "start":
            text += f"@{self.pattern}"
        if self.positions != "original":
            text += f"@{self.positions}"
        return text

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) + 1

    def layers_of_stage(self, stage: int) -> range:
        """The decoder layers that run on stage ``stage``'s rows; empty for a boundary at 0."""
        if not 0 <= checks.integer("stage", stage) < self.num_stages:
            raise ValueError(f"stage: expected 0 to {self.num_stages - 1}, got {stage}")
        edges = [0, *(b.layer for b in self.boundaries), self.num_layers]
        return range(edges[stage], edges[stage + 1])

    def stage_of_layer(self, layer: int) -> int:
        """The stage whose rows layer ``layer`` sees: how many boundaries lie at or before it."""
        if not 0 <= checks.integer("layer", layer) < self.num_layers:
            raise ValueError(f"layer: expected 0 to {self.num_layers - 1}, got {layer}")
        return sum(b.layer <= layer for b in self.boundaries)

    def kept(
        self, count: int, height: int | None = None, width: int | None = None
    ) -> tuple[int, ...]:
        """Vision tokens in each stage for one image of ``count`` tokens (grid: height x width)."""
        checks.integer("count", count, 0)
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                checks.integer(name, side, 0)
        if self.pattern != "grid":
            counts = [count]
            for boundary in self.boundaries:
                counts.append(kept_count(counts[-1], boundary.keep))
            return tuple(counts)
        if height is None or width is None or height * width != count:
            raise ValueError(
                "height, width: pattern 'grid' needs both, with height * width = count = "
                f"{count}, got {height} and {width}"
            )
        counts = [count]
        for boundary in self.boundaries:
            rows, columns = boundary.factors
            height, width = kept_count(height, rows), kept_count(width, columns)
            counts.append(height * width)
        return tuple(counts)


def kept_count(count: int, keep: Fraction) -> int:
    """``ceil(count * keep)``, exactly."""
    return -(-count * keep.numerator // keep.denominator)


def parse_share(keep: object, layer: int) -> Boundary:
    """One boundary's share as :meth:`CompressionSchedule.to_dict` writes it, or as a number."""
    if isinstance(keep, bool) or not isinstance(keep, str | int | float | Fraction):
        raise TypeError(f"keep: expected a share such as '1/4', got {checks.shown(keep)}")
    parser = _Parser(str(keep))
    boundary = parser.boundary(layer)
    parser.end()
    return boundary


class _Parser:
    """Reads a schedule text left to right and knows where it is when something is wrong."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, expected: str) -> ValueError:
        rest = self.text[self.at :]
        got = repr(rest if len(rest) <= 20 else rest[:20] + "...") if rest else "the end"
        return ValueError(
            f"schedule {checks.shown(self.text)}: at character {self.at + 1} expected {expected}, "
            f"got {got}"
        )

    def take(self, pattern: re.Pattern[str], expected: str) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            raise self.fail(expected)
        self.at = match.end()
        return match.group()

    def accept(self, mark: str) -> bool:
        found = self.text.startswith(mark, self.at)
        self.at += len(mark) * found
        return found

    def end(self) -> None:
        if self.at != len(self.text):
            raise self.fail("the end of the keep share")

    def share(self) -> Fraction:
        start = self.at
        number = self.take(_NUMBER, "a keep share such as 1/4 or 0.25")
        denominator = number.partition("/")[2]
        if denominator and int(denominator) == 0:
            self.at = start
            raise self.fail("a keep share with a denominator above 0")
        share = Fraction(number)
        if share > 1:
            self.at = start
            raise self.fail("a keep share in [0, 1]")
        return share

    def boundary(self, layer: int) -> Boundary:
        share = self.share()
        if not self.accept("x"):
            return Boundary(layer, share)
        columns = self.share()
        return Boundary(layer, share * columns, share, columns)

    def boundaries(self) -> Iterable[Boundary]:
        if not self.text or self.text.startswith("@"):
            return
        while True:
            layer = int(self.take(_LAYER, "a layer number"))
            if not self.accept(":"):
                raise self.fail("':' and a keep share after the layer")
            yield self.boundary(layer)
            if not self.accept(","):
                return

    def options(self) -> dict[str, str]:
        chosen: dict[str, str] = {}
        choices = [("pattern", PATTERNS), ("positions", POSITIONS)]
        while self.at < len(self.text):
            if not self.accept("@"):
                raise self.fail("',', '@' or the end")
            for name, values in choices:
                rest = self.text[self.at :].partition("@")[0]
                if rest in values and name not in chosen:
                    chosen[name] = rest
                    self.at += len(rest)
                    break
            else:
                free = [v for name, values in choices if name not in chosen for v in values]
                raise self.fail(f"one of {', '.join(free)}" if free else "the end")
        return chosen

    def schedule(self, num_layers: int) -> CompressionSchedule:
        boundaries = tuple(self.boundaries())
        options = self.options()
        try:
            return CompressionSchedule(num_layers, boundaries, **options)
        except ValueError as error:
            raise ValueError(f"schedule {checks.shown(self.text)}: {error}") from None
