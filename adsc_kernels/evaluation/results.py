"""The file of results: one entry for each method, budget and seed, written as it grows."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from adsc_kernels import checks
from adsc_kernels.hub import read_json

KEY = ("method", "schedule", "budget", "seed", "adapter")


class Results:
    """Entries by `KEY`. `right` is a text of 0 and 1, one for each question done so far; `seconds`
    are by device and dtype.

    Raises ValueError where the file is of other questions or another model.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"about": about, "runs": []}
        if path.is_file():
            self.data = read_json(path)
            theirs = self.data.get("about")
            if theirs != about:
                got = checks.shown(theirs, 200)
                raise ValueError(f"{path}: expected results about {about}, got {got}")

    def entry(self, **key: Any) -> dict[str, Any]:
        """The one of this key, new if there was none."""
        for run in self.data["runs"]:
            if all(run.get(name) == key.get(name) for name in KEY):
                return run
        run = {**key, "right": "", "seconds": {}}
        self.data["runs"].append(run)
        return run

    def save(self) -> None:
        """Under another name first: an interruption leaves the old file whole."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def digest(path: Path) -> str:
    """Of a file's bytes, short."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
