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

import pytest

pytest.importorskip("vllm")


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A random LLaVA of 6 layers and 64-token images: its folder, and transformers' model of it."""
    from engines import Checkpoint

    return Checkpoint.make(tmp_path_factory.mktemp("llava"))
