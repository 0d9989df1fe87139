"""``adsc doctor``: prints the report of ``adsc_kernels.doctor``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from adsc_kernels.cli.text import in_bytes, table


def add_parser(commands: Any) -> None:
    """Add ``doctor`` and its options to the commands."""
    parser = commands.add_parser(
        "doctor",
        help="what is installed, which backends work and why the others don't",
        description="Say what is installed, which backends work, and why the others don't.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> None:
    """Print the report."""
    from adsc_kernels.doctor import report

    found = report()
    print(json.dumps(found, indent=1) if args.json else _as_text(found))


def _as_text(found: dict[str, Any]) -> str:
    cuda = found["cuda"]
    lines = [["python", found["python"]]]
    lines += [[name, version or "not installed"] for name, version in found["packages"].items()]
    lines.append(["CUDA in torch", cuda["torch_built_for"] or "none: a CPU-only torch"])
    for index, device in enumerate(cuda["devices"]):
        memory = in_bytes(device["bytes"])
        lines.append(
            [f"device {index}", f"{device['name']}, capability {device['capability']}, {memory}"]
        )
    if not cuda["devices"]:
        lines.append(["devices", "torch sees no GPU"])
    lines.append(["native build", ""])
    lines += [[f"  {name}", _one(value)] for name, value in found["build"].items()]
    lines.append(["bundled checkpoint", found["checkpoint"] or "missing"])
    width = max(len(name) for name, _ in lines)
    parts = ["\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)]
    rows = [[name, _here(state), state["reason"]] for name, state in found["backends"].items()]
    parts.append(table(["backend", "here", "why not"], rows, left=3))
    rows = [
        [
            name,
            ", ".join(state["chosen_for"]) or _here(state),
            _one(state["phases"]),
            state["dtypes"],
            state["head_sizes"],
            state["capability"],
            _one(state["cuda_graphs"]),
            "yes" if state["keys_in_shares"] else "no",
            state["paged"],
            state["reason"],
        ]
        for name, state in found["attention"].items()
    ]
    head = ["attention", "here", "for", "dtypes", "head sizes", "capability", "graphs", "shares"]
    head += ["paged", "why not"]
    parts.append(table(head, rows, left=len(head)))
    return "\n\n".join(parts)


def _here(state: dict[str, Any]) -> str:
    return "works" if state["works"] else "no"


def _one(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "-")
