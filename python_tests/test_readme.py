"""The README's Python runs as one session, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from adsc_kernels.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    inline = re.findall(r"`((?:adsc|make) [^`]+)`", README)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in (*lines, *inline) if line.strip()]


def test_python_blocks():
    session: dict[str, object] = {}
    assert len(blocks("python")) >= 5
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), session)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands(words):
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "adsc":
        assert build_parser().parse_args(words[1:]).command == words[1]
    else:
        assert words[:2] == ["pip", "install"]


def test_both_front_doors_are_shown():
    assert {"demo", "test"} <= {words[1] for words in commands() if words[0] == "make"}
