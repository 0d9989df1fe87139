"""How compiled Triton kernels are found again: one key never stands for two of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction, TensorWrapper
from triton_ahead import Driver

from adsc_kernels import fakes
from adsc_kernels.backend import INTERPRETED
from adsc_kernels.triton import boundary_step, compact, downsample, launch
from adsc_kernels.triton import downsample_add_rms_norm as norm
from adsc_kernels.triton.boundary_step import boundary_step_kernel
from adsc_kernels.triton.compact import compact_kernel
from adsc_kernels.triton.downsample import downsample_kernel
from adsc_kernels.triton.launch import _for_triton, compiled_of, pointer
from adsc_kernels.triton.pointwise import rotate_kernel, silu_mul_kernel

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

MEMORY = torch.zeros(1024, dtype=torch.uint8)
KERNELS = [downsample_kernel, boundary_step_kernel, compact_kernel, rotate_kernel]
DTYPES = [torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float32]

SPACES = [MEMORY[offset:] for offset in (0, 1, 2, 4, 8, 16, 24, 32)]
INTS = [0, 1, 2, 3, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 16, 2**32, 2**40, -1, -16, -(2**31)]
POINTERS = [pointer(x, dtype) for dtype in DTYPES for x in SPACES]
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
    moves = ((pointer(x, torch.int8), x), (x, x), 5, (1, 2))
    _, values = compiled_of(downsample_kernel).key_of([moves, None, 7, x])
    place = x.data_ptr()
    assert values == [((place, place), (place, place), 5, (1, 2)), None, 7, place]


def addresses(argument: Any) -> Any:
    """What was compiled takes in place of an argument that Triton takes."""
    if isinstance(argument, tuple):
        return tuple(map(addresses, argument))
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nothing is launched: the kernel, the key and what Triton asks of each launch."""
    found: list[Any] = []

    def start(kernel: Any, _: int, device: Any, given: Any, debug: bool, options: Any) -> None:
        key, values = compiled_of(kernel).key_of(given)
        typed = [*map(_for_triton, given)]
        assert tuple(values) == addresses(tuple(typed))
        named = {name: options[name] for name in kernel.arg_names[len(typed) :]}
        found.append((kernel, (*key, *options.items()), asked(kernel, [*typed, *named.values()])))

    monkeypatch.setattr(launch, "_start", start)
    return found


def rows(dtype: torch.dtype, offset: int, width: int, stride: int) -> torch.Tensor:
    return torch.zeros(8192, dtype=dtype)[offset:].as_strided((7, width), (stride, 1))


FORMS = [*itertools.product((0, 1, 8), (1, 16, 40), (40, 41, 48))]  # offset, width, stride
SEGMENTS = torch.zeros(3, 6, dtype=torch.int32)
LIST = torch.zeros(5, dtype=torch.int64)


def step_into(x: torch.Tensor, start: int, *starts: int) -> None:
    """A step over a layout whose outputs begin off multiples of 16 bytes: the rows by `start`, the
    metadata by `starts` in turn."""
    spans = torch.zeros(2, 3, dtype=torch.int32)
    arguments = (x, None, None, 1e-6, [], None, None, LIST[:2].int(), spans, [1, 4], "start", 0, 3)
    outs = [
        torch.empty(out.nbytes + 8, dtype=torch.uint8)[off:][: out.nbytes].view(out.dtype)
        for out, off in zip(fakes.boundary_step(*arguments), (start, *starts * 3), strict=True)
    ]
    boundary_step.write_boundary_step(outs, *arguments)


def launches() -> Iterator[Callable[[], object]]:
    """Of rows and caches that begin, end and follow one another off any multiple of 16 bytes."""
    for dtype, form in itertools.product((torch.float32, torch.bfloat16, torch.float64), FORMS):
        x, y = rows(dtype, *form), rows(torch.uint8, *form)
        weight = torch.ones(64, dtype=dtype)[form[0] :][: form[1]]
        bounds = LIST[form[0] % 3 :].int()[:3]
        for segments, indices in ((SEGMENTS, None), (None, LIST), (None, bounds)):
            where = (segments, indices, 3)
            yield lambda x=x, where=where: downsample.downsample(x, *where)
            yield lambda x=x, y=y, where=where: downsample.downsample_many([y, x], *where)
            yield lambda x=x, w=weight, where=where: norm.downsample_add_rms_norm(
                x, x, w, *where, 1e-6
            )
            yield lambda x=x, y=y, w=weight, where=where: boundary_step.boundary_step(
                x, x, w, 1e-6, [y], *where[:2], None, None, [], "start", 0, 3
            )
        for starts in itertools.product((0, 8), repeat=3):
            yield lambda x=x, starts=starts: step_into(x, *starts)
        offset, width, stride = form
        for shape in ((2, 3, 4, width), (6, 4, width)):
            strides = (12 * stride, 4 * stride, stride, 1)[-len(shape) :]
            k, v = (
                torch.zeros(8192, dtype=dtype)[i:].as_strided(shape, strides) for i in (0, offset)
            )
            yield lambda k=k, v=v: compact.compact_kv_(
                [k, v], 1, SEGMENTS, None, LIST[:3], None, None, LIST[:2], None, "NHD"
            )


def test_launches_of_equal_keys_are_one_kernel(started: list[Any]) -> None:
    """As above, of what launchers hand over, who pack what they know: no two launches that Triton
    would compile anew for have one key, and a repeated one is found again."""
    kernels: dict[Any, Any] = {}
    for run in launches():
        run()
        for kernel, key, wanted in started:
            assert kernels.setdefault((kernel, key), wanted) == wanted
        first = [key for _, key, _ in started]
        started.clear()
        run()
        assert [key for _, key, _ in started] == first
        started.clear()
    assert len(kernels) > 500


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
            arguments = (pointer(x, torch.int8), out, stride)
            launch._start_here(silu_mul_kernel, 3, 90, arguments, False, options)
    assert [a[2] for a, _ in compiled] == [32, 32, 16]
    assert all(isinstance(a[0], TensorWrapper) for a, _ in compiled)
    assert launched == [
        ((3, 1, 1), (x.data_ptr(), out.data_ptr(), 32, 8, 16), 0) for out in (y, y[32:])
    ]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_who_hooks_launches_hears_of_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody does, the launcher is called at once; a Triton without it is asked its way."""
    ways: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *values, stream: ways.append(("Triton's", grid, stream, values))

    class Known(Kernel):
        function, packed_metadata = 5, "packed"
        run = staticmethod(lambda *given: ways.append(given))

    short, plain = (3, 1, 1, 7, 5, "packed", None, None, None, 8), ("Triton's", (3, 1, 1), 7, (8,))
    for kernel, wanted in ((Known(), short), (Kernel(), plain)):
        launch._kept(kernel).start(3, 7, [8])
        assert ways.pop() == wanted
    heard: Any = lambda metadata: None  # noqa: E731
    chain = getattr(knobs.runtime, name)
    if hasattr(chain, "add"):  # from Triton 3.6 on, or so
        chain.add(heard)
    else:
        monkeypatch.setattr(knobs.runtime, name, heard)
    try:
        launch._kept(Known()).start(3, 7, [8])
    finally:
        if hasattr(chain, "remove"):
            chain.remove(heard)
    assert ways == [plain]
