"""The compaction examples run as they are, each without its engine; they check themselves."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from adsc_kernels.integrations import layouts

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


def test_the_page_on_compaction():
    """Its Python runs as one session, and what its comments say is so."""
    text = (EXAMPLES.parent / "docs" / "compaction.md").read_text(encoding="utf-8")
    first, *others = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    session: dict[str, Any] = {}
    exec(first, session)
    assert session["after"].seq_lens.host == (258,)
    assert (len(session["after"].free_blocks), session["table"].numel()) == (27, 44)
    for block in others:
        exec(block, session)
    assert repr(session["plan"].rounded) in text
    sizes = session["answer"].cache_bytes_per_stage
    assert sizes[0] == sizes[1]
    named = set(re.findall(r"`(from_\w+|\w+_to_\w+|crop_\w+)`", text)) - {"req_to_token"}
    public = {name for name in vars(layouts) if re.match("from_|crop_", name) or "_to_" in name}
    assert named == public
    assert set(re.findall(r"`compaction_(\w+)\.py`", text)) == set(LAST_LINES)
