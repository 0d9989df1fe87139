"""The native artefacts: what they say of themselves, what they need, the wheel they travel in."""

import importlib.metadata
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import _distutils_hack
import pytest
import setuptools
import torch

import adsc_kernels as adsc
from adsc_kernels import _C, _library

ROOT = Path(__file__).resolve().parent.parent
NEEDED, RPATH, RUNPATH = 1, 15, 29  # tags of an ELF file's dynamic section
MEGABYTE = 10**6


def dynamic_entries(library: Path) -> list[tuple[int, str]]:
    """(tag, text) of the entries of a 64-bit ELF's dynamic section that name something."""
    data = library.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    table, size, count = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQII", data, table + i * size) for i in range(count)]
    (dynamic,) = (section for section in sections if section[1] == 6)  # SHT_DYNAMIC
    strings = sections[dynamic[6]][4]
    entries = []
    for offset in range(dynamic[4], dynamic[4] + dynamic[5], 16):
        tag, value = struct.unpack_from("<qQ", data, offset)
        if tag in (NEEDED, RPATH, RUNPATH):
            start = strings + value
            entries.append((tag, data[start : data.index(b"\0", start)].decode()))
    return entries


def test_build_info_describes_this_build():
    info = _C.build_info()
    assert f'version = "{info["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert info["compiler"].split()[0] in ("GNU", "Clang")
    assert "-std=c++20" in info["cxx_flags"]
    assert tuple(map(int, info["torch"].split(".")[:2])) >= (2, 10)
    if info["cuda_archs"] is None:
        assert info["cuda_reason"] and info["cuda_compiler"] is None
    else:
        assert info["cuda_reason"] is None and info["cuda_compiler"]
        assert any(arch.startswith("sm_") for arch in info["cuda_archs"])
        assert info["cuda_archs"][-1].startswith("compute_")


def test_the_library_is_loaded_once_and_registers_the_ops():
    assert _library.load() is _library.load()
    for name in ("downsample", "downsample_many", "upsample_grad", "downsample_add_rms_norm"):
        assert hasattr(torch.ops.adsc_kernels, name)


def test_the_library_needs_nothing_that_a_cpu_only_torch_lacks():
    entries = dynamic_entries(_library.LIBRARY)
    needed = {name.split(".so")[0] for tag, name in entries if tag == NEEDED}
    assert {"libtorch", "libtorch_cpu"} <= needed
    # No CUDA library, no libc10 and no Python: the stable ABI, and what every Linux has.
    system = {"libstdc++", "libgcc_s", "libm", "libc", "libdl", "libpthread", "librt"}
    assert needed - {"libtorch", "libtorch_cpu"} <= system | {"ld-linux-x86-64", "ld-linux-aarch64"}
    assert not [name for tag, name in entries if tag in (RPATH, RUNPATH)]


def test_a_missing_or_broken_library_is_an_import_error_that_names_it(tmp_path, monkeypatch):
    path = tmp_path / "libadsc_ops.so"
    monkeypatch.setattr(_library, "LIBRARY", path)
    with pytest.raises(ImportError, match=r"libadsc_ops\.so is missing; build it with"):
        _library.load.__wrapped__()
    path.write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"libadsc_ops\.so does not load on torch"):
        _library.load.__wrapped__()


def test_a_missing_module_is_an_import_error_that_says_what_to_do():
    code = "import sys; sys.modules['adsc_kernels._C'] = None; import adsc_kernels"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "the native module _C is missing or does not load" in run.stderr.splitlines()[-1]


def test_device_code_names_the_architecture_or_the_reason():
    if _C.build_info()["cuda_archs"] and torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability(0)
        assert _library.device_code(0) // 10 == major
        return
    with pytest.raises(adsc.UnsupportedError, match=r"no CUDA kernels: \w|for CUDA device 0: \w"):
        _library.device_code(0)


def test_an_import_brings_the_ops_and_not_dynamo():
    code = (
        "import sys, torch, adsc_kernels\n"
        "print(torch.ops.adsc_kernels.downsample.default)\n"
        "print(sorted({'torch._dynamo', 'transformers', 'triton', 'sympy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["adsc_kernels.downsample.default", "[]"]


def run_setup_beside(folder: Path) -> subprocess.CompletedProcess:
    """setup.py as in an isolated build: there is setuptools, and beside it only `folder`."""
    for package in (setuptools, _distutils_hack):
        (folder / package.__name__).symlink_to(Path(package.__file__).parent)
    return subprocess.run(
        [sys.executable, "-S", "setup.py", "--version"],
        cwd=ROOT,
        env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )


def test_setup_stops_with_one_sentence_where_there_is_no_torch(tmp_path):
    result = run_setup_beside(tmp_path)
    assert result.returncode != 0
    assert "pip install --no-build-isolation ." in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_setup_stops_at_a_torch_that_is_too_old(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch-2.9.1.dist-info").mkdir()
    (tmp_path / "torch-2.9.1.dist-info/METADATA").write_text("Name: torch\nVersion: 2.9.1\n")
    result = run_setup_beside(tmp_path)
    assert result.returncode != 0
    assert "needs torch>=2.10, and torch 2.9.1 is installed" in result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """As `make wheel` makes it: of what this environment's own build has compiled already."""
    folder = tmp_path_factory.mktemp("wheel")
    for made in (ROOT / "build").glob("lib*"):  # what setuptools put together before
        shutil.rmtree(made)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "."]
    command += ["--wheel-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_is_small_and_complete(wheel):
    assert wheel.stat().st_size < 10 * MEGABYTE
    names = set(zipfile.ZipFile(wheel).namelist())
    module = Path(_C.__file__).name
    assert {f"adsc_kernels/{module}", "adsc_kernels/libadsc_ops.so"} <= names
    sources = [path for path in (ROOT / "adsc_kernels").rglob("*") if path.is_file()]
    shipped = {
        str(path.relative_to(ROOT))
        for path in sources
        if "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert shipped <= names
    others = {name for name in names - shipped if ".dist-info/" not in name}
    assert others == {f"adsc_kernels/{module}", "adsc_kernels/libadsc_ops.so", "adsc_command.py"}
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_works_where_no_compiler_is(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    for name in ("_C", "libadsc_ops"):
        (library,) = (site / "adsc_kernels").glob(f"{name}*.so")
        assert b".symtab" not in library.read_bytes(), "not stripped"
    code = (
        "import torch, adsc_kernels as adsc\n"
        "print(adsc.__file__)\n"
        "with adsc.backend('cpu'):\n"
        "    rows = adsc.ops.downsample(torch.arange(4), keep_indices=torch.tensor([0, 3]))\n"
        "print(rows.tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == [str(site / "adsc_kernels/__init__.py"), "[0, 3]"]


SDIST = """
import sys
from setuptools import build_meta
print(build_meta.build_sdist(sys.argv[1]))
"""


def sdist(source: Path, folder: Path) -> Path:
    """What setuptools makes of a copy of the sources."""
    result = subprocess.run(
        [sys.executable, "-c", SDIST, str(folder)],
        cwd=source,
        env=os.environ | {"ADSC_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / result.stdout.split()[-1]


@pytest.fixture
def source(tmp_path) -> Path:
    made = (".git", ".venv*", "build", "dist", "out", "*.egg-info", "*.so", ".*_cache")
    made += ("__pycache__", ".hypothesis", ".benchmarks", "results")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*made)))


def test_the_sdist_holds_what_its_tests_read(source, tmp_path):
    with tarfile.open(sdist(source, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    hidden = {name for name in files if name.startswith((".ci", ".gitignore", ".github"))}
    egg = {name for name in files if ".egg-info" in name}
    assert files - hidden - egg - names == set()


def test_type_checkers_follow_an_editable_install():
    """By a .pth with the folder of the sources: they run no finder. `make venv` made this one."""
    files = importlib.metadata.files("adsc_kernels") or []
    names = [file.name for file in files if file.name.startswith("__editable__")]
    if not names:
        pytest.skip("the package is installed from a wheel here")
    (pth,) = (file for file in files if file.name in names)
    assert pth.suffix == ".pth" and pth.read_text().strip() == str(ROOT)
