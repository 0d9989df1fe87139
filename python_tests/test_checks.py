"""Drawn bad input to every public function outside of ops: the right error, by the argument's name.

Each argument is named with what it takes; everything else in JUNK must be refused for it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adsc_kernels as adsc
from adsc_kernels import Boundary, CompressionSchedule, attention, checks
from adsc_kernels.accounting import (
    MODELS,
    CacheFormat,
    Convention,
    ModelShape,
    account,
    account_lengths,
)
from adsc_kernels.attention import varlen_attention
from adsc_kernels.budget import search

SCHEDULE = CompressionSchedule.parse("1:1/2,2:1/2", 4)
PLAN = adsc.make_plan(SCHEDULE, [0, 20], [(0, 2, 10)])
LLAVA = MODELS["llava-1.5-7b"]
MEAN = CompressionSchedule.preset("llava-1.5-7b/192")
ROWS = torch.zeros(20, 2, 8)
with warnings.catch_warnings():  # torch means to drop them
    warnings.simplefilter("ignore", UserWarning)
    QUANTIZED = torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)
FORMS: dict[str, dict[str, Any]] = {
    "int": {"0": 0, "1": 1, "2": 2, "7": 7},
    "huge": {"2^31": 2**31, "2^63": 2**63, "10^5000": 10**5000},
    "negative": {"-1": -1, "-2^63": -(2**63)},
    "bool": {"True": True, "False": False},
    "float": {"1.0": 1.0, "0.5": 0.5, "nan": float("nan"), "inf": float("inf")},
    "text": {"''": "", "nope": "nope", "1": "1", "arabic 3": "\u0663", "float16": "float16"},
    "none": {"None": None},
    "list": {"[]": [], "[1]": [1], "[None]": [None]},
    "other": {
        "object": object(),
        "bytes": b"1",
        "class": int,
        "tensor": torch.zeros(2),
        "plan": PLAN,
        "dtype": torch.float16,
    },
}


def plan(**given: Any) -> object:
    good = dict(schedule=SCHEDULE, cu_seqlens=[0, 20], vision_spans=[(0, 2, 10)])
    return adsc.make_plan(**good | given)


def budget(**given: Any) -> object:
    good = dict(average_tokens=192, vision_tokens=576, num_layers=32, num_boundaries=2)
    return search(**good | given)


def counted(**given: Any) -> object:
    return account(**dict(shape=LLAVA, schedule=MEAN, text_tokens=101, vision_tokens=576) | given)


def by_lengths(**given: Any) -> object:
    good = dict(shape=LLAVA, schedule=MEAN, seq_lens=[(9,), (7,), (5,)], tiles=0)
    return account_lengths(**good | given)


def shape(**given: Any) -> object:
    names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
    sizes = dict.fromkeys((*names, "intermediate_size", "vocab_size"), 8)
    return ModelShape(**sizes | given)


def attend(**given: Any) -> object:
    return varlen_attention(**dict(q=ROWS, k=ROWS, v=ROWS, stage=PLAN.stages[0]) | given)


def schedule(**given: Any) -> object:
    return CompressionSchedule(**dict(num_layers=4, boundaries=SCHEDULE.boundaries) | given)


# (call, argument, how errors name it, the forms that are refused whatever the value)
NO_INT = ("huge", "negative", "bool", "float", "text", "list", "other")
NO_COUNT = (*NO_INT[1:], "none")
NO_NAME = ("int", "huge", "negative", "bool", "float", "text", "list", "other")
ARGUMENTS: list[tuple[Callable[..., object], str, str, tuple[str, ...]]] = [
    (plan, "schedule", "schedule", (*NO_NAME, "none")),
    (plan, "cu_seqlens", "cu_seqlens", (*NO_INT, "int", "none")),
    (plan, "vision_spans", "vision_spans", ("int", "huge", "bool", "float", "none", "text")),
    (plan, "chunks", "chunks", NO_NAME),
    (plan, "device", "device", NO_NAME),
    (plan, "block_size", "block_size", NO_INT),
    (plan, "align", "align", NO_NAME),
    (schedule, "num_layers", "num_layers", (*NO_INT, "none")),
    (schedule, "boundaries", "boundaries", ("int", "huge", "bool", "float", "text", "other")),
    (schedule, "pattern", "pattern", (*NO_NAME, "none")),
    (schedule, "positions", "positions", (*NO_NAME, "none")),
    (
        lambda layer: Boundary(layer, Fraction(1, 2)),
        "layer",
        "boundary layer",
        ("bool", "float", "text", "none", "list"),
    ),
    (
        lambda keep: Boundary(1, keep),
        "keep",
        "keep",
        ("huge", "negative", "bool", "float", "text", "none", "list", "other"),
    ),
    (
        lambda text: CompressionSchedule.parse(text, 4),
        "text",
        "schedule",
        ("int", "bool", "float", "none", "list", "other"),
    ),
    (CompressionSchedule.preset, "name", "preset", (*NO_NAME, "none")),
    (CompressionSchedule.from_dict, "data", "schedule", (*NO_NAME, "none")),
    (SCHEDULE.kept, "count", "count", NO_COUNT),
    (SCHEDULE.stage_of_layer, "layer", "layer", (*NO_INT, "none")),
    (SCHEDULE.layers_of_stage, "stage", "stage", (*NO_INT, "none")),
    (lambda i: PLAN.between(i, 2), "i", "between", (*NO_INT, "none")),
    (
        budget,
        "average_tokens",
        "average_tokens",
        ("huge", "negative", "bool", "text", "none", "list", "other"),
    ),
    (budget, "num_layers", "num_layers", (*NO_INT, "none")),
    (budget, "num_boundaries", "num_boundaries", (*NO_INT, "none")),
    (budget, "vision_tokens", "vision_tokens|average_tokens", (*NO_INT, "none")),
    (budget, "block_size", "block_size|keep, block_size", (*NO_INT, "none")),
    (budget, "keep", "keep", ("huge", "negative", "bool", "text", "list", "other")),
    (budget, "mixed", "mixed", (*NO_INT[:2], "float", "text", "none", "list", "other")),
    (budget, "grid", "grid", NO_NAME),
    (counted, "shape", "shape", (*NO_NAME, "none")),
    (counted, "schedule", "schedule", (*NO_NAME, "none")),
    (counted, "text_tokens", "text_tokens", NO_COUNT),
    (counted, "decode_tokens", "decode_tokens", NO_COUNT),
    (counted, "tiles", "tiles", ("negative", "bool", "float", "text", "list", "other")),
    (counted, "grid", "grid", NO_NAME),
    (counted, "kv_dtype", "kv_dtype", ("int", "bool", "float", "none", "list", "other")),
    (counted, "convention", "convention", (*NO_NAME, "none")),
    (counted, "compact_to", "compact_to", NO_INT),
    (by_lengths, "seq_lens", "seq_lens", (*NO_NAME, "none")),
    (by_lengths, "tiles", "tiles", NO_COUNT),
    (shape, "num_layers", "num_layers", (*NO_INT, "none")),
    (shape, "hidden_size", "hidden_size", NO_COUNT),
    (shape, "tied", "tied", ("int", "huge", "float", "text", "none", "list", "other")),
    (lambda block_size: CacheFormat(block_size=block_size), "block_size", "block_size", NO_COUNT),
    (lambda scores: Convention("mine", "", scores), "scores", "scores", (*NO_NAME, "none")),
    (attend, "q", "q", (*NO_NAME, "none")),
    (attend, "k", "q, k, v|k", (*NO_NAME, "none")),
    (attend, "stage", "stage", (*NO_NAME, "none")),
    (attend, "keys", "keys", NO_NAME),
    (attend, "scale", "scale", ("bool", "text", "list", "other")),
    (attend, "backend", "backend", (*NO_NAME, "none")),
    (lambda device: attention.available(device), "device", "device", (*NO_NAME, "none")),
    (lambda dtype: attention.available("cpu", dtype), "dtype", "dtype", (*NO_INT, "none")),
    (adsc.backend, "name", "backend", (*NO_NAME, "none")),
]


@st.composite
def bad_calls(draw) -> tuple[Callable[..., object], str, str, Any]:
    call, argument, name, forms = draw(st.sampled_from(ARGUMENTS))
    form = draw(st.sampled_from(forms))
    label = draw(st.sampled_from(sorted(FORMS[form])))
    if argument == "dtype" and label == "dtype":
        label = "object"
    return call, argument, name, FORMS[form][label]


@settings(max_examples=400, deadline=None)
@given(bad_calls())
def test_whatever_comes_is_named(case) -> None:
    call, argument, name, value = case
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**{argument: value})
    assert caught.type in (TypeError, ValueError)
    message = str(caught.value)
    assert re.search(rf"^(grid_(height|width)|{name})\b.*: ", message), message
    assert "incompatible function arguments" not in message
    assert len(message) < 1000


# Digits of several scripts: all of them are int()'s, and re's too.
DIGITS = st.text(alphabet="12\u0661\u0967\uff11", min_size=1, max_size=1)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(alphabet="0123456789:/,.@x-grid", max_size=14),
        st.builds("{}:1/{}{}".format, DIGITS, DIGITS, st.sampled_from(["", "@center", ",19:.5"])),
    )
)
def test_a_schedule_is_read_in_ascii_and_written_back(text: str) -> None:
    try:
        found = CompressionSchedule.parse(text, 20)
    except ValueError as error:
        names = "schedule", "keep", "boundary layer"
        assert str(error).startswith(names)  # noqa: PT017  # most texts are bad, some are not
        return
    assert text.isascii()
    assert CompressionSchedule.parse(str(found), 20) == found


def test_what_is_right_passes() -> None:
    stage = PLAN.stages[1]
    assert checks.stage("stage", stage) is stage
    assert checks.tensor("x", ROWS) is ROWS
    assert checks.device("device", "cpu") == torch.device("cpu")
    assert checks.number("eps", 0.5, 0) == 0.5
    with pytest.raises(TypeError, match=r"stage: expected a stage such as .*, got Comp"):
        checks.stage("stage", PLAN)
    with pytest.raises(TypeError, match="x: expected plain elements, got a quantized"):
        checks.tensor("x", QUANTIZED)
    with pytest.raises(TypeError, match=r"dtype: expected a torch\.dtype, got 'float16'"):
        checks.dtype("dtype", "float16")


def test_it_is_light() -> None:
    """The module is for the command line too."""
    code = "import adsc_command, sys; import adsc_kernels.checks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
