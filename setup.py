"""Builds the native parts with CMake and ninja against the torch that is installed.

Environment: CUDA code is built for the GPUs that are here, where there are any. ADSC_CUDA_ARCHS=all
builds for every architecture, ADSC_CUDA_ARCHS="80;90a" for these; ADSC_CUDA=0 builds without CUDA,
ADSC_CUDA=1 insists on it; MAX_JOBS limits the parallel compilations.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "adsc_kernels"
OLDEST_TORCH = (2, 10)
OLDEST_SETUPTOOLS = (77,)  # reads the licence as pyproject.toml writes it


def older(version: str, oldest: tuple[int, ...]) -> bool:
    return tuple(map(int, re.findall(r"\d+", version)[: len(oldest)])) < oldest


def installed_torch() -> tuple[Path, str]:
    """The folder and version of the torch to build against; stops where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"{PACKAGE} is built against the torch that is installed, and there is none here: "
            "pip install 'torch>=2.10' cmake ninja pybind11 setuptools wheel, "
            "then pip install --no-build-isolation ."
        )
    version = importlib.metadata.version("torch")
    if older(version, OLDEST_TORCH):
        sys.exit(f"{PACKAGE} needs torch>=2.10, and torch {version} is installed")
    return Path(spec.submodule_search_locations[0]), version


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt once; it makes every native file of the package."""

    def package_dir(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / PACKAGE

    def run(self) -> None:
        torch_dir, torch_version = installed_torch()
        cmake, ninja = (self.tool(name) for name in ("cmake", "ninja"))
        try:
            import pybind11
        except ImportError:
            sys.exit(f"{PACKAGE} needs pybind11 to build: pip install pybind11")
        build_dir = ROOT / "build" / sys.implementation.cache_tag
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "ADSC_VERSION": self.distribution.get_version(),
            "ADSC_TORCH_DIR": torch_dir,
            "ADSC_TORCH_VERSION": torch_version,
            "ADSC_CUDA": os.environ.get("ADSC_CUDA", "auto"),
            "ADSC_CUDA_ARCHS": os.environ.get("ADSC_CUDA_ARCHS", ""),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        for arguments in (
            ["-S", ROOT, "-B", build_dir, "-G", "Ninja", *defines],
            ["--build", build_dir, *jobs],
            ["--install", build_dir, "--prefix", self.package_dir(), "--strip"],
        ):
            if code := subprocess.run([cmake, *arguments]).returncode:
                sys.exit(code)  # CMake has said what is wrong

    def tool(self, name: str) -> str:
        """A build tool: this environment's own before whatever else is on the PATH."""
        folders = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        found = shutil.which(name, path=folders)
        if found is None:
            sys.exit(f"{PACKAGE} needs {name} to build: pip install {name}")
        return found

    def get_outputs(self) -> list[str]:
        module = Path(self.get_ext_filename("_C")).name
        return [str(self.package_dir() / name) for name in (module, "libadsc_ops.so")]


# Right away: an isolated build stops here, before pip fetches a second torch of several gigabytes.
installed_torch()
if older(setuptools.__version__, OLDEST_SETUPTOOLS):
    sys.exit(
        f"{PACKAGE} needs setuptools>=77 to build, and setuptools {setuptools.__version__} is "
        "installed: pip install --upgrade setuptools"
    )
setup(ext_modules=[Extension(f"{PACKAGE}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
