"""Compiled stages: each has an artifact of its own in vLLM's cache, and loads that one.

In mode 3, that of a GPU (`as_on_a_gpu`), a warm start loads what a cold one saved.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from engines import MIXED, answer, check, engine

from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.vllm import units

SCHEDULE = "1:1/3,2:1/2"


@contextmanager
def compiled(short_llava, schedule):
    """An engine with its units, and how many artifacts it compiled and loaded."""
    from vllm.compilation.counter import compilation_counter as counter

    torch.compiler.reset()
    before = counter.num_aot_compiles, counter.num_aot_artifacts_loaded
    options = dict(enforce_eager=False, max_num_batched_tokens=90, max_num_seqs=4)
    with engine(short_llava, schedule, **options) as llm:
        after = counter.num_aot_compiles, counter.num_aot_artifacts_loaded
        yield llm, tuple(b - a for a, b in zip(before, after, strict=True))


def artifacts(folder) -> set:
    return set(folder.rglob("rank_0_0/model"))


def test_cold_and_warm(short_llava, as_on_a_gpu):
    with compiled(short_llava, SCHEDULE) as (llm, made):
        assert made == (3, 0)
        check(short_llava, SCHEDULE, MIXED, answer(llm, MIXED, 4))
    assert len(artifacts(as_on_a_gpu)) == 3
    with compiled(short_llava, SCHEDULE) as (llm, made):
        assert made == (0, 3)
        check(short_llava, SCHEDULE, MIXED, answer(llm, MIXED, 4))


def keys(schedule: str) -> set[str]:
    """By which vLLM finds the artifacts of a schedule's stages."""
    rule = CompressionSchedule.parse(schedule, 6)
    made = [units.unit_class(rule, s).forward for s in range(rule.num_stages)]
    assert len({forward.__code__ for forward in made}) == rule.num_stages  # by which Dynamo does
    return {units._model_hash_key(forward) for forward in made}


def test_keys():
    assert len(keys("2:1/3,4:1/2")) == 3
    assert len(keys("2:1/3,4:1/2") | keys("2:1/2,4:1/2")) == 6  # nothing of another schedule


def test_shared_artifact(short_llava, monkeypatch):
    """Refused, whatever the reason: here all units get the first one's name."""
    first = units.unit_class(CompressionSchedule.parse(SCHEDULE, 3), 0)
    monkeypatch.setattr(units, "unit_class", lambda schedule, stage: first)
    with (
        pytest.raises(RuntimeError, match="expected an artifact for each of 3, got 1"),
        engine(short_llava, SCHEDULE),
    ):
        pass
