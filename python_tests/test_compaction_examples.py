"""The compaction examples run as they are, each without its engine; they check themselves."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LAST_LINES = {
    "flashinfer": "attention over the pages equals attention over the rows picked by hand",
    "llava": "the first picture shrunk again",
    "sglang": "FlashInfer's kv_indptr for the next step: [0, 133, 241], 241 indices",
    "tensorrt_llm": "blocks free now: 26 of 41, the shared one not among them",
    "transformers": "shrunk StaticCache:",
    "vllm": "rounded for the blocks' sake:",
}


def test_every_example_is_run():
    found = {path.stem.removeprefix("compaction_") for path in EXAMPLES.glob("compaction_*.py")}
    assert found == set(LAST_LINES)


@pytest.mark.parametrize("name", LAST_LINES)
def test_example(name, capsys):
    runpy.run_path(str(EXAMPLES / f"compaction_{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith(LAST_LINES[name])
