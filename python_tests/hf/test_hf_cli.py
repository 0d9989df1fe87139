"""`adsc run --engine transformers` on the bundled checkpoint."""

from __future__ import annotations

import json

import torch

from adsc_kernels.cli import main


def run(*more: str) -> int:
    ask = ["--ask", "What is the largest digit?", "--max-new-tokens", "8", "--dtype", "float32"]
    device = str(torch.get_default_device())
    return main(["run", "--engine", "transformers", *ask, "--device", device, *more])


def test_it_answers_dense_and_compressed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not run("--schedule", "4:1/4,8:1/4", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["schedule"] == "4:1/4,8:1/4"
    dense, compressed = (facts["answers"][0][way] for way in ("dense", "compressed"))
    assert len(set(dense["cached_tokens"])) == 1
    lens = compressed["cached_tokens"]
    assert [lens[0] - lens[n] for n in (3, 4, 8)] == [0, 432, 540]
    assert compressed["cache_bytes"] * dense["cached_tokens"][0] * 16 == dense["cache_bytes"] * sum(
        lens
    )
    assert not run("--json") and not list(tmp_path.iterdir())


def test_options_of_the_thin_model_alone_are_refused(capsys):
    assert run("--temperature", "0.5")
    assert "--temperature" in capsys.readouterr().err
