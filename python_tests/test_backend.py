"""Which backend serves a call: nesting, threads, the environment, and no silent fallback."""

import os
import subprocess
import sys
import threading
from importlib import import_module
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from adsc_kernels import _library, ops, reference
from adsc_kernels.backend import available_backends, backend, current, native_problem, resolve
from adsc_kernels.errors import UnsupportedError

backend_module = import_module("adsc_kernels.backend")  # the package has the class by this name
CPU = torch.device("cpu")
X = torch.arange(6)
ROWS = torch.tensor([4, 0])


def test_nests_and_restores() -> None:
    assert current() == "auto"
    with backend("reference"):
        assert resolve(CPU) == "reference"
        with backend("cpu"):
            assert resolve(CPU) == "cpu"
            with backend("auto"):
                assert resolve(CPU) == "cpu"
        assert resolve(CPU) == "reference"
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert current() == "auto"


def test_one_object_may_be_entered_twice() -> None:
    choice = backend("reference")
    with choice, choice:
        assert current() == "reference"
    assert current() == "auto"


def test_threads_choose_for_themselves() -> None:
    seen, inside, done = [], threading.Event(), threading.Event()

    def other() -> None:
        with backend("cpu"):
            inside.set()
            done.wait(10)
            seen.append(current())

    thread = threading.Thread(target=other)
    with backend("reference"):
        thread.start()
        assert inside.wait(10)
        assert current() == "reference"
        done.set()
        thread.join()
    assert seen == ["cpu"]


def test_what_is_available() -> None:
    backends = available_backends()
    assert set(backends) == {"cuda", "triton", "cpu", "reference"}
    assert backends["reference"] == (True, "")
    assert backends["cpu"] == (True, "")
    for name in ("cuda", "triton"):
        works, why = backends[name]
        if torch.cuda.is_available():
            assert works == (why == "")
        else:
            assert not works
            assert "no CUDA in torch" in why or "no CUDA device" in why or "triton" in why


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what the backends were found to serve, and does so again afterwards."""
    monkeypatch.setattr(backend_module, "_problems", {})
    monkeypatch.setattr(backend_module, "_automatic_on_cuda", {})


@pytest.mark.usefixtures("no_memory")
def test_each_cuda_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device 0 has native code, 1 can run Triton, 2 has neither."""
    asked = []

    def device_code(index: int) -> int:
        asked.append(index)
        if index:
            raise UnsupportedError(f"no code for {index}")
        return 90

    monkeypatch.setattr(_library, "device_code", device_code)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 0), (7, 5))[i])
    monkeypatch.setattr(backend_module, "_triton_package_problem", lambda: "")
    wanted = ["cuda", "triton", "reference"]
    for _ in range(2):
        assert [resolve(torch.device("cuda", i)) for i in range(3)] == wanted
    assert asked == [0, 1, 2]
    assert available_backends()["cuda"] == (True, "")
    with backend("cuda"), pytest.raises(UnsupportedError, match="no code for 1"):
        resolve(torch.device("cuda:1"))
    with backend("triton"):
        assert resolve(torch.device("cuda:0")) == "triton"
        with pytest.raises(UnsupportedError, match=r"compute capability .* device 2 has \(7, 5\)"):
            resolve(torch.device("cuda:2"))


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(("found", "why"), [(None, "not installed"), ("3.4.0", "3.4.0 is inst")])
def test_triton_is_missing_or_old(
    monkeypatch: pytest.MonkeyPatch, found: str | None, why: str
) -> None:
    def version(package: str) -> str:
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(backend_module, "version", version)
    backend_module._triton_package_problem.cache_clear()
    works, reason = available_backends()["triton"]
    backend_module._triton_package_problem.cache_clear()
    assert not works
    assert why in reason


def test_the_choice_is_a_constant_of_the_graph() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if resolve(x.device) == "cpu" else x - 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1
    with backend("reference"):
        assert compiled(torch.zeros(1)).item() == -1
    assert compiled(torch.zeros(1)).item() == 1


def test_auto_falls_to_the_reference_where_no_kernel_is() -> None:
    assert resolve(torch.device("meta")) == "reference"
    if not torch.cuda.is_available():
        assert resolve(torch.device("cuda")) == "reference"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_is_not_there_never_falls_back(name: str) -> None:
    with backend(name), pytest.raises(UnsupportedError, match=f"'{name}' can't serve .* cpu: "):
        ops.downsample(X, keep_indices=ROWS)


def test_a_backend_for_another_device_never_falls_back() -> None:
    with backend("cpu"), pytest.raises(UnsupportedError, match=r"'cpu' can't serve .* meta: .*cpu"):
        ops.downsample(X.to("meta"), keep_indices=ROWS.to("meta"))


@pytest.mark.parametrize("name", ["gpu", "", None, "CPU"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        ValueError, match="backend: expected one of 'auto', 'cuda', 'triton', 'cpu' or 'reference'"
    ):
        backend(name)


def test_the_reference_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "downsample", lambda *_, **__: "reference")
    assert torch.equal(ops.downsample(X, keep_indices=ROWS), X[ROWS])
    with backend("reference"):
        assert ops.downsample(X, keep_indices=ROWS) == "reference"


def test_gradients_of_the_reference() -> None:
    x, y = (torch.randn(6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(2, dtype=torch.float64, requires_grad=True)
    with backend("reference"):
        assert torch.autograd.gradcheck(lambda x: ops.downsample(x, keep_indices=ROWS), x)
        assert torch.autograd.gradcheck(
            lambda *args: ops.downsample_add_rms_norm(*args, keep_indices=ROWS), (x, y, w)
        )


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_decides_outside_of_blocks() -> None:
    code = (
        "from adsc_kernels.backend import *\n"
        "assert current() == 'reference'\n"
        "with backend('cpu'): assert current() == 'cpu'\n"
        "assert current() == 'reference'"
    )
    done = run_python(code, ADSC_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    done = run_python("import adsc_kernels.ops", ADSC_BACKEND="gpu")
    assert done.returncode != 0
    assert "ADSC_BACKEND: expected one of 'auto'" in done.stderr


def test_without_the_library_the_reference_serves() -> None:
    code = (
        "import torch\n"
        "def fail(path): raise OSError('not today')\n"
        "torch.ops.load_library = fail\n"
        "from adsc_kernels import ops\n"
        "from adsc_kernels.backend import available_backends, backend\n"
        "from adsc_kernels.errors import UnsupportedError\n"
        "works, why = available_backends()['cpu']\n"
        "assert not works and 'not today' in why, why\n"
        "x, rows = torch.arange(4), torch.tensor([2])\n"
        "assert ops.downsample(x, keep_indices=rows).tolist() == [2]\n"
        "try:\n"
        "    with backend('cpu'): ops.downsample(x, keep_indices=rows)\n"
        "except UnsupportedError as error: assert 'not today' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert native_problem() == ""


def test_the_triton_ops_have_the_native_schemas() -> None:
    names = [
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("adsc_triton::")
    ]
    assert "downsample" in names
    for name in names:
        schemas = [
            getattr(space, name).default._schema
            for space in (torch.ops.adsc_kernels, torch.ops.adsc_triton)
        ]
        native, triton = (str(schema).partition("::")[2] for schema in schemas)
        assert triton == native
