"""How compiled Triton kernels are found again: one key never stands for two of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction, TensorWrapper
from triton_ahead import Driver

from adsc_kernels.backend import INTERPRETED
from adsc_kernels.triton import launch
from adsc_kernels.triton.boundary_step import boundary_step_kernel
from adsc_kernels.triton.compact import compact_kernel
from adsc_kernels.triton.downsample import downsample_kernel
from adsc_kernels.triton.launch import Pointer, _for_triton, compiled_of
from adsc_kernels.triton.pointwise import rotate_kernel, silu_mul_kernel

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

MEMORY = torch.zeros(1024, dtype=torch.uint8)
KERNELS = [downsample_kernel, boundary_step_kernel, compact_kernel, rotate_kernel]
DTYPES = [torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float32]

SPACES = [MEMORY[offset:] for offset in (0, 1, 2, 4, 8, 16, 24, 32)]
INTS = [0, 1, 2, 3, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 16, 2**32, 2**40, -1, -16, -(2**31)]
POINTERS = [Pointer(x, dtype) for dtype in DTYPES for x in SPACES]
TENSORS = [x[:64].view(dtype) for dtype in DTYPES for x in (MEMORY[16:], MEMORY[32:])]
CONSTANTS = [*INTS, None, True, False, 0.0, 1.0, (1, 2), ()]
VARIANTS = [
    *CONSTANTS,
    (True, 2),
    *POINTERS,
    *TENSORS,
    *[(x, 5) for x in (*INTS, *POINTERS, None, True)],
    *[((x,), (7, y)) for x in POINTERS for y in (1, 16, 3)],
]


def asked(kernel: Any, arguments: list[Any]) -> tuple[Any, ...]:
    """All that Triton itself compiles anew for; it too takes 1 for True among constants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Driver(90))
        *_, binder = kernel.device_caches[90]
        return tuple(binder(*map(_for_triton, arguments))[1])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_equal_keys_are_one_kernel(kernel: Any) -> None:
    """Whatever is changed in an argument: where the key stays, so does all that Triton asks."""
    known = compiled_of(kernel)
    shared = 0
    for i, parameter in enumerate(kernel.params):
        found: dict[Any, Any] = {}
        for x in CONSTANTS if parameter.is_constexpr else VARIANTS:
            arguments: list[Any] = [2] * len(kernel.params)
            arguments[i] = x
            key = tuple(known.key_of(arguments)[0])
            shared += key in found
            assert found.setdefault(key, asked(kernel, arguments)) == asked(kernel, arguments), x
    assert shared > 100


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_what_differs_from_batch_to_batch_is_no_part_of_a_key(kernel: Any) -> None:
    known = compiled_of(kernel)
    arguments: list[Any] = [2] * len(kernel.params)
    for i, parameter in enumerate(kernel.params):
        changed = arguments.copy()
        changed[i] = 48
        same = known.key_of(arguments)[0] == known.key_of(changed)[0]
        assert same == parameter.do_not_specialize, parameter.name


def test_values_are_those_of_the_arguments() -> None:
    x = MEMORY[3:]
    moves = ((Pointer(x, torch.int8), x), 5)
    key, values = compiled_of(downsample_kernel).key_of([moves, None, 7])
    place = x.data_ptr() % 16
    assert values == [((x.data_ptr(), x.data_ptr()), 5), None, 7]
    assert key == [
        tuple,
        2,
        tuple,
        2,
        torch.int8,
        place,
        torch.uint8,
        place,
        5,
        type(None),
        None,
        0,
    ]


def test_a_second_call_launches_what_the_first_compiled() -> None:
    """Values come in the order of the kernel's parameters, pointers as addresses."""
    launched: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *values, stream: launched.append((grid, values, stream))

    compiled: list[Any] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Kernel:
        compiled.append((arguments, options))
        return Kernel()

    x, y = MEMORY[:64], MEMORY[64:128]
    options = {"INNER": 8, "BLOCK": 16, "num_warps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Driver(90))
        patch.setattr(JITFunction, "run", run)
        patch.setattr(launch, "_compiled", {})
        for out, stride in ((y, 32), (y, 32), (y[1:], 32), (y, 16), (y[32:], 32)):
            arguments = (Pointer(x, torch.int8), out, stride)
            launch._start_here(silu_mul_kernel, 3, 90, arguments, False, options)
    assert [a[2] for a, _ in compiled] == [32, 32, 16]
    assert all(isinstance(a[0], TensorWrapper) for a, _ in compiled)
    assert launched == [
        ((3, 1, 1), (x.data_ptr(), out.data_ptr(), 32, 8, 16), 0) for out in (y, y[32:])
    ]
