"""Stamps benchmark JSON with what the numbers depend on."""

import platform
from pathlib import Path
from typing import Any

import torch

import adsc_kernels


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Device and versions, no names of hosts; pytest-benchmark itself adds the commit."""
    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info["cpu_name"] = _cpu_name()
    machine_info["gpu_name"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["torch"] = torch.__version__
    machine_info["adsc_kernels"] = adsc_kernels.__version__
    machine_info["torch_threads"] = torch.get_num_threads()


def pytest_benchmark_update_json(
    config: Any, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Statistics without the time of every single round, and no names of folders."""
    for private in ("project", "branch"):
        output_json["commit_info"].pop(private, None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
