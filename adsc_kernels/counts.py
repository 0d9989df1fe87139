"""Checking counts that users give."""

from __future__ import annotations


def at_least(least: int, **counts: object) -> None:
    """``TypeError`` for what is no int, ``ValueError`` for one below ``least``; names it."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"{name}: expected an int, got {count!r}")
        if count < least:
            raise ValueError(f"{name}: expected at least {least}, got {count}")
