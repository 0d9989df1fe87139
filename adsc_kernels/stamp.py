"""What measurements depend on: the date, the device, versions and the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent


def stamp(device: torch.device | str, *, dry_run: bool = False) -> dict[str, Any]:
    """As plain JSON types, for results on this device.

    `commit` is the source folder's, or what ADSC_COMMIT says; None where this copy is installed.
    `changed_files`: how many tracked ones differ from it.
    """
    import torch

    changed = _of_git("status", "--porcelain", "-uno") or ""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "dry_run": dry_run,
        "device": f"{device} (dry run)" if dry_run else str(device),
        "driver": None,
        "commit": os.environ.get("ADSC_COMMIT") or _of_git("rev-parse", "HEAD"),
        "changed_files": len(changed.splitlines()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": (re.findall(r"release (\S+),", said_by("nvcc", "--version") or "") or [None])[0],
    }
    for package in ("triton", "transformers"):
        facts[package] = version_of(package)
    if torch.device(device).type == "cuda":
        found = torch.cuda.get_device_properties(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts.update(
            device=found.name,
            capability=f"{found.major}.{found.minor}",
            multiprocessors=found.multi_processor_count,
            l2_bytes=found.L2_cache_size,
            memory_bytes=found.total_memory,
            driver=said_by(*query),
        )
    return facts


def said_by(*command: str) -> str | None:
    """What a program prints, run in the source folder; None where it isn't there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    """Of an installed package; None where it isn't."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _of_git(*command: str) -> str | None:
    """An installed copy may lie inside of another repository, which says nothing about it."""
    ours = said_by("git", "ls-files", str(Path(__file__).resolve()))
    return said_by("git", *command) if ours else None
