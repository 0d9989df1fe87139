"""Schedules for a budget: where to drop so that layers see so many vision tokens on average.

With ``n_s`` tokens in stage ``s`` and boundary ``i`` before layer ``b_i``, the tokens that ``L``
layers process are ``L * n_B + sum((n_{i-1} - n_i) * b_i)``: for given keep shares, a sum of one
term per boundary. So the sums within reach are found boundary by boundary, each set of sums as the
bits of one integer, and no combination of layers is tried that doesn't end at the best sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice, pairwise, product

from adsc_kernels import checks
from adsc_kernels.schedule import (
    MAX_LAYERS,
    PATTERNS,
    POSITIONS,
    Boundary,
    CompressionSchedule,
    parse_share,
)

Share = str | int | float | Fraction
KEEP = ("1/2", "1/3", "1/4")
KEEP_GRID = ("1/2x1/2", "1/2x1", "1x1/2", "1/3x1/3")
MOST_BOUNDARIES = 100
MOST = 20_000  # schedules that a search lists
MOST_BITS = 2**33  # of sums within reach, at the very most: one for each token, layer and boundary

# Layers of the model, and the best schedule for its 576 tokens that leaves the first two layers
# whole: one share at two boundaries, or for 64, which that can't reach, any at three. All average
# exactly what they say, and drop multiples of 16 tokens.
PRESETS = {
    "llava-1.5-7b/192": (32, "5:1/3,17:1/3"),
    "llava-1.5-7b/128": (32, "2:1/3,10:1/3"),
    "llava-1.5-7b/64": (32, "2:1/4,3:1/3,12:1/3"),
    "llava-1.5-13b/192": (40, "6:1/3,22:1/3"),
    "llava-1.5-13b/128": (40, "2:1/3,14:1/3"),
    "llava-1.5-13b/64": (40, "2:1/4,4:1/3,21:1/3"),
}


@dataclass(frozen=True)
class BudgetSearch:
    """What :func:`search` found: every schedule whose average is as near as can be, best first."""

    asked: Fraction
    schedules: tuple[CompressionSchedule, ...]
    averages: tuple[Fraction, ...]  # of each; at most two values, one below and one above

    @property
    def exact(self) -> bool:
        """Whether they average just what was asked."""
        return self.averages[0] == self.asked


def search(
    average_tokens: int | float | Fraction,
    vision_tokens: int,
    num_layers: int,
    num_boundaries: int,
    *,
    keep: Share | Sequence[Share] | None = None,
    mixed: bool = False,
    first_layer: int = 1,
    last_layer: int | None = None,
    block_size: int = 1,
    exact: bool = False,
    pattern: str = "start",
    positions: str = "original",
    grid: tuple[int, int] | None = None,
) -> BudgetSearch:
    """All schedules whose layers process ``average_tokens`` of ``vision_tokens`` on average, or as
    near to that as any does.

    keep: the shares to choose from, 1/2, 1/3 and 1/4 unless told; rows x columns such as
      ``"1/2x1/2"`` for ``pattern="grid"``, which needs ``grid``, the span's (height, width).
    mixed: a share of its own for each boundary; else one share for all of them.
    first_layer, last_layer: where boundaries may lie (1 to ``num_layers - 1``).
    block_size: only schedules that have dropped a multiple of it in every stage, so that a paged
      cache gives up whole blocks and the tokens behind a picture stay in place.
    exact: refuse what is near only.

    They are ranked by these, in this order: nearest; at most what was asked, before more; stages
    of the most even depth (least sum of squared layer counts); the first boundary latest, then the
    second and so on; the shares in the order of ``keep``.

    Raises ``ValueError`` for bad input, and for a budget outside of what such schedules can reach
    or, with ``exact``, can't meet: it names the nearest.
    """
    asked = _average(average_tokens)
    layers = _allowed(num_layers, num_boundaries, first_layer, last_layer)
    checks.integer("vision_tokens", vision_tokens, 1)
    checks.integer("block_size", block_size, 1)
    checks.choice("pattern", pattern, PATTERNS)
    checks.choice("positions", positions, POSITIONS)
    checks.flag("mixed", mixed)
    checks.flag("exact", exact)
    if grid is not None:
        checks.pair("grid", grid, 1, ("height", "width"))
    if not 0 < asked <= vision_tokens:
        raise ValueError(
            f"average_tokens: expected above 0 and at most vision_tokens = {vision_tokens}, "
            f"got {checks.shown(average_tokens)}"
        )
    shares = _shares(keep, pattern)
    mixtures = len(shares) ** num_boundaries if mixed else len(shares)
    if mixtures > MOST or mixtures * vision_tokens * len(layers) ** 2 * num_boundaries > MOST_BITS:
        raise ValueError(
            "vision_tokens, num_layers, num_boundaries, keep: expected a search that fits memory, "
            f"got {vision_tokens} tokens, {len(layers)} layers and {mixtures} choices of shares"
        )
    named = ", ".join(share.share() for share in shares)
    chains = []
    for order in product(shares, repeat=num_boundaries if mixed else 1):
        chosen = order if mixed else order * num_boundaries
        counts = _at(range(num_boundaries), chosen, num_layers, pattern).kept(
            vision_tokens, *(grid or (None, None))
        )
        whole = all((vision_tokens - count) % block_size == 0 for count in counts)
        if whole and all(a > b for a, b in pairwise(counts)):
            chains.append(_Chain(chosen, counts, num_layers, layers))
    if not chains:
        raise ValueError(
            f"keep, block_size: expected shares that drop tokens at {num_boundaries} boundaries, "
            f"in multiples of {block_size}; none of {named} does so with {vision_tokens} tokens"
        )
    wanted = asked * num_layers
    nearest = min(abs(total - wanted) for chain in chains for total in chain.around(wanted))
    optima = (
        ((total > wanted, *chain.rank(places)), places, chain, total)
        for chain in chains
        for total in chain.around(wanted)
        if abs(total - wanted) == nearest
        for places in chain.layers_for(total)
    )
    found = sorted(islice(optima, MOST + 1), key=lambda one: one[0])
    if len(found) > MOST:
        raise ValueError(
            f"num_boundaries: expected few enough for at most {MOST} schedules, got more; fewer "
            "boundaries, shares or allowed layers narrow it down"
        )
    result = BudgetSearch(
        asked,
        tuple(_at(at, chain.order, num_layers, pattern, positions) for _, at, chain, _ in found),
        tuple(Fraction(total, num_layers) for *_, total in found),
    )
    least = min(chain.least for chain in chains)
    most = max(chain.most for chain in chains)
    if not least <= wanted <= most or (exact and nearest):
        raise ValueError(
            f"average_tokens: {float(asked):g} can't be met by {num_boundaries} "
            f"{'boundary' if num_boundaries == 1 else 'boundaries'} in layers {layers[0]} to "
            f"{layers[-1]} with keep {named}, which average {least / num_layers:g} to "
            f"{most / num_layers:g}; the nearest is {float(result.averages[0]):g}, by "
            f"{result.schedules[0]}"
        )
    return result


class _Chain:
    """One choice of shares, and the sums that boundaries at various layers give."""

    def __init__(
        self, order: Sequence[Boundary], counts: tuple[int, ...], num_layers: int, layers: range
    ) -> None:
        self.order, self.num_layers, self.allowed = order, num_layers, layers
        self.drops = [a - b for a, b in pairwise(counts)]
        self.floor = counts[-1] * num_layers
        # reach[i][j]: bit t is set where boundaries 0..i can sum to t with i before layers[j].
        self.reach: list[list[int]] = []
        before = [1] * len(layers)  # sums of the boundaries before, all before layers[j]
        for drop in self.drops:
            here = [sums << drop * layer for sums, layer in zip(before, layers, strict=True)]
            self.reach.append(here)
            before, seen = [], 0
            for sums in here:
                before.append(seen)
                seen |= sums
        self.sums = seen

    @property
    def least(self) -> int:
        """The smallest total of tokens over the layers."""
        return self.floor + (self.sums & -self.sums).bit_length() - 1

    @property
    def most(self) -> int:
        """The largest."""
        return self.floor + self.sums.bit_length() - 1

    def around(self, wanted: Fraction) -> list[int]:
        """The nearest totals at most and at least ``wanted``; one where it is met, or at an end."""
        below = wanted.__floor__() - self.floor
        above = wanted.__ceil__() - self.floor
        totals = []
        if below >= 0 and (under := self.sums & ((1 << below + 1) - 1)):
            totals.append(self.floor + under.bit_length() - 1)
        if over := self.sums >> max(0, above):
            totals.append(self.floor + max(0, above) + (over & -over).bit_length() - 1)
        return sorted(set(totals))

    def rank(self, layers: tuple[int, ...]) -> tuple[int, list[int], list[int]]:
        """What schedules of one total rank by."""
        depths = (b - a for a, b in pairwise((0, *layers, self.num_layers)))
        uneven = sum(depth**2 for depth in depths)
        return uneven, [-layer for layer in layers], [share.layer for share in self.order]

    def layers_for(self, total: int) -> Iterator[tuple[int, ...]]:
        """All choices of layers that give this total."""
        return self._layers(len(self.drops) - 1, total - self.floor, len(self.allowed))

    def _layers(self, boundary: int, total: int, stop: int) -> Iterator[tuple[int, ...]]:
        """Layers of the boundaries up to this one that give ``total``, before layers[stop]."""
        for j in range(stop):
            if not self.reach[boundary][j] >> total & 1:
                continue
            layer = self.allowed[j]
            if boundary == 0:
                yield (layer,)
            else:
                for before in self._layers(boundary - 1, total - self.drops[boundary] * layer, j):
                    yield (*before, layer)


def _average(value: int | float | Fraction) -> Fraction:
    given = checks.number("average_tokens", value)
    # As it is written: 0.1 is a tenth. A float's own digits are few.
    exact = Fraction(str(given)) if isinstance(given, float) else Fraction(given)
    if exact.denominator > checks.INT32_MAX:
        got = checks.shown(value)
        raise ValueError(f"average_tokens: expected a denominator below 2^31, got {got}")
    return exact


def _allowed(num_layers: int, num_boundaries: int, first: int, last: int | None) -> range:
    """The layers that may have a boundary."""
    checks.integer("num_layers", num_layers, 1, MAX_LAYERS)
    checks.integer("num_boundaries", num_boundaries, 1)
    last = num_layers - 1 if last is None else last
    checks.at_least(0, first_layer=first, last_layer=last)
    if not first <= last < num_layers:
        raise ValueError(
            f"first_layer, last_layer: expected first <= last < num_layers = {num_layers}, "
            f"got {first} and {last}"
        )
    layers = range(first, last + 1)
    if num_boundaries > (most := min(len(layers), MOST_BOUNDARIES)):
        raise ValueError(
            f"num_boundaries: expected at most {most}, and one for each layer from {first} to "
            f"{last}, got {checks.shown(num_boundaries)}"
        )
    return layers


def _shares(keep: Share | Sequence[Share] | None, pattern: str) -> list[Boundary]:
    """Each share as a boundary, whose layer is its place among them."""
    if keep is None:
        keep = KEEP_GRID if pattern == "grid" else KEEP
    given = (keep,) if isinstance(keep, str | int | float | Fraction) else keep
    shares: list[Boundary] = []
    for share in checks.sequence("keep", given, object):
        try:
            boundary = parse_share(share, len(shares))
            CompressionSchedule(len(shares) + 1, (boundary,), pattern)
        except ValueError as error:
            raise ValueError(f"keep: {error}") from None
        if not 0 < boundary.keep < 1:
            raise ValueError(f"keep: expected shares above 0 and below 1, got {share}")
        shares.append(boundary)
    if not shares:
        raise ValueError("keep: expected at least one share, got none")
    return shares


def _at(
    layers: Iterable[int],
    shares: Sequence[Boundary],
    num_layers: int,
    pattern: str,
    positions: str = "original",
) -> CompressionSchedule:
    """The schedule of these shares at these layers."""
    boundaries = tuple(
        replace(share, layer=layer) for layer, share in zip(layers, shares, strict=True)
    )
    return CompressionSchedule(num_layers, boundaries, pattern, positions)
