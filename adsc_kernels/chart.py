"""Charts of accounts, by matplotlib: tokens by layer, MACs and cache by stage."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from adsc_kernels.accounting import Account
from adsc_kernels.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by most colour-blind people, and in grey (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def draw(accounts: Sequence[tuple[str, Account]], title: str) -> Image.Image:
    """:func:`figure` as a picture."""
    file = io.BytesIO()
    figure(accounts, title).savefig(file, format="png")
    return Image.open(file)


def figure(accounts: Sequence[tuple[str, Account]], title: str) -> Figure:
    """One chart of these accounts, each with its name, the dense one first.

    They are those of :func:`adsc_kernels.accounting.account`. Raises ``UnsupportedError`` where
    matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "charts need matplotlib, which is not installed: pip install matplotlib"
        ) from None
    chart = Figure(figsize=(15, 4.6), dpi=110, layout="constrained")
    chart.suptitle(title)
    tokens, macs, cache = chart.subplots(1, 3, width_ratios=(1.2, 1, 1))
    _tokens(tokens, accounts)
    _macs(macs, accounts)
    _cache(cache, accounts)
    return chart


def _tokens(axes: Axes, accounts: Sequence[tuple[str, Account]]) -> None:
    for index, (name, account) in enumerate(accounts):
        counts = [
            count
            for stage, count in zip(account.stages, account.vision_tokens or (), strict=True)
            for _ in stage.layers
        ]
        edges = [n - 0.5 for n in range(len(counts) + 1)]
        label = f"{name} (mean {account.average_processed:g})"
        colour = COLOURS[index % len(COLOURS)]
        axes.stairs(counts, edges, label=label, color=colour, linewidth=2, baseline=None)
    axes.set(xlabel="decoder layer", ylabel="vision tokens processed", ylim=(0, None))
    axes.legend(fontsize="small")


def _macs(axes: Axes, accounts: Sequence[tuple[str, Account]]) -> None:
    """A bar for each account: its stages, and what is outside of them."""
    rows = []
    for _, account in accounts:
        outside = account.outside_prefill.total + account.outside_decode.total
        rows.append([("tower, head", outside), *_stages(account, "macs")])
    _bars(axes, [name for name, _ in accounts], rows, 1e12, "tera-MACs")


def _cache(axes: Axes, accounts: Sequence[tuple[str, Account]]) -> None:
    rows = [_stages(account, "kv_bytes") for _, account in accounts]
    _bars(axes, [name for name, _ in accounts], rows, 2**20, "KV cache, MiB")


def _stages(account: Account, what: str) -> list[tuple[str, int]]:
    return [(f"stage {n}", getattr(stage, what)) for n, stage in enumerate(account.stages)]


def _bars(
    axes: Axes, names: list[str], rows: list[list[tuple[str, int]]], unit: float, label: str
) -> None:
    labels = list(dict.fromkeys(part for row in rows for part, _ in row))
    places = range(len(names))
    bottom = [0.0] * len(names)
    for part in labels:
        heights = [dict(row).get(part, 0) / unit for row in rows]
        stage = part.removeprefix("stage ")
        colour = COLOURS[int(stage) % len(COLOURS)] if stage.isdecimal() else "#999999"
        axes.bar(places, heights, bottom=bottom, label=part, width=0.6, color=colour)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    for place, top in zip(places, bottom, strict=True):
        cut = f"\n-{100 * (1 - top / bottom[0]):.1f} %" if place else ""
        axes.annotate(f"{top:.4g}{cut}", (place, top), ha="center", va="bottom", fontsize="small")
    axes.set_xticks(list(places), [name.replace(",", ",\n") for name in names], fontsize="small")
    axes.set(ylabel=label, ylim=(0, 1.2 * max(bottom)))
    axes.legend(fontsize="small")
