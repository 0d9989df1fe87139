"""For the tests that Triton's interpreter runs: test_triton_interpreter.py starts them."""

import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_interpreter.py, not these files"
sys.path.insert(0, str(Path(__file__).parents[1]))

convert_float = interpreter._convert_float
patch_language = interpreter._patch_lang


@functools.cache
def patch_language_once(function):  # type: ignore[no-untyped-def]
    """The interpreter does so at each call of a function, a third of its time."""
    scope = patch_language(function)
    scope._changes.clear()  # nothing is put back: all that this process launches is interpreted
    return scope


interpreter._patch_lang = patch_language_once


def rounding_as_a_gpu_does(data, source, target, rounding_mode):  # type: ignore[no-untyped-def]
    """The interpreter cuts a float32 off where a GPU rounds it to the nearest bfloat16."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert_float(data, source, target, rounding_mode)
    rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", rounding_as_a_gpu_does)
