"""How sure a measured accuracy is: Wilson's interval, and a bootstrap over pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # of the normal distribution, for 95 %
DRAWS = 2000


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % for a share of independent questions; (0, 1) where there are none."""
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z * np.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)


def bootstrap(
    right: Sequence[bool],
    pictures: Sequence[object],
    dense: Sequence[bool] | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % for a share, or with `dense` for the ratio of both, over drawn sets of whole pictures.

    Questions about one picture stand or fall together, which makes this wider than Wilson's.
    """
    names = {name: n for n, name in enumerate(dict.fromkeys(pictures))}
    of = np.array([names[name] for name in pictures])
    sums = [
        np.bincount(of, weights=np.asarray(values, float), minlength=len(names))
        for values in (right, [True] * len(of) if dense is None else dense)
    ]
    draws = np.random.default_rng(seed).integers(len(names), size=(DRAWS, len(names)))
    below = sums[1][draws].sum(1)
    shares = sums[0][draws].sum(1) / np.where(below == 0, 1, below)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)
