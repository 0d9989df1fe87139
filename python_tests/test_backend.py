"""Which backend serves a call: nesting, threads, the environment, and no silent fallback."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from adsc_kernels import ops, reference
from adsc_kernels.backend import available_backends, backend, current, native_problem, resolve
from adsc_kernels.errors import UnsupportedError

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
        assert not works
        assert "in this version" in why


def test_auto_falls_to_the_reference_where_no_kernel_is() -> None:
    assert resolve(torch.device("meta")) == "reference"
    assert resolve(torch.device("cuda")) == "reference"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_is_not_there_never_falls_back(name: str) -> None:
    with backend(name), pytest.raises(UnsupportedError, match=f"'{name}' is not available: no "):
        ops.downsample(X, keep_indices=ROWS)


def test_a_backend_for_another_device_never_falls_back() -> None:
    with backend("cpu"), pytest.raises(UnsupportedError, match=r"'cpu': expected .*got .* meta"):
        ops.downsample(X.to("meta"), keep_indices=ROWS.to("meta"))


@pytest.mark.parametrize("name", ["gpu", "", None, "CPU"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        ValueError, match="backend: expected one of auto, cuda, triton, cpu, reference"
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
    assert "ADSC_BACKEND: expected one of auto" in done.stderr


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
