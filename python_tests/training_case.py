"""A few questions about a bundled picture as training data, and a run's configuration on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from adsc_kernels.hub import bundled_checkpoint
from adsc_kernels.training.config import TrainConfig

MODEL = bundled_checkpoint()
STRONG = "0:1/6x1/6@grid"  # 16 tokens: steps are quick


def write_data(folder: Path, count: int = 8) -> Path:
    """So many questions about two pictures, in LLaVA's format."""
    folder.mkdir(exist_ok=True)
    known = json.loads((MODEL / "pictures" / "questions.json").read_text())
    records = []
    for name in list(known)[:2]:
        shutil.copy(MODEL / "pictures" / name, folder)
        for asked in known[name][: count // 2]:
            turns = [
                {"from": "human", "value": f"<image>\n{asked['question']}"},
                {"from": "gpt", "value": asked["answer"]},
            ]
            records.append({"image": name, "conversations": turns, "kind": asked["kind"]})
    (folder / "conversations.json").write_text(json.dumps(records))
    return folder


def config(data: Path, out: Path, **changes: Any) -> TrainConfig:
    """Four steps of two questions, a state on disk after two."""
    given = {
        "model": str(MODEL),
        "data": str(data),
        "out": str(out),
        "schedule": STRONG,
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "log_every": 1,
        "save_every": 2,
        "device": "cpu",
        "lora": {"rank": 4},
    }
    return TrainConfig.from_dict({**given, **changes})
