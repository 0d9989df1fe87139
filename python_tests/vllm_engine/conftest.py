"""Small engines on a CPU, and what is said of them. Run by `make test-vllm`, in `.venv-vllm`."""

from __future__ import annotations

import os

# Before vLLM is imported: one thread and no pinning, for machines that do other things too.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import once
import pytest


def pytest_collection_finish():
    """In the processes that run tests; the one that hands them out needs no vLLM."""
    once.install()


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker ends long after the other."""
    items.sort(key=lambda item: item.path.stem not in ("test_processes", "test_server"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A random LLaVA of 6 layers and 64-token images: its folder, and transformers' model of it."""
    from engines import Checkpoint

    return Checkpoint.make(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def short_llava(tmp_path_factory):
    """The same with 3 layers, for what is compiled: its time goes by layers."""
    from engines import Checkpoint

    return Checkpoint.make(tmp_path_factory.mktemp("short_llava"), layers=3)


@pytest.fixture
def as_on_a_gpu(monkeypatch, tmp_path):
    """Compilation in vLLM's mode 3, with an empty cache: its folder.

    On a CPU vLLM takes mode 2 in its place, whose artifacts it saves but can't load. So mode 3 is
    kept here, without its passes over CUDA's operators.
    """
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def keep_mode(cls, vllm_config):
        update(cls, vllm_config)
        compilation = vllm_config.compilation_config
        if compilation.mode == CompilationMode.DYNAMO_TRACE_ONCE:
            compilation.mode, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, []

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_mode))
    monkeypatch.setattr(PostGradPassManager, "__call__", lambda self, graph: None)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    return tmp_path
