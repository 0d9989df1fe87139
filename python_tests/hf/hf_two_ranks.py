"""One of two processes that share a step: run by test_hf_peft.py under torch.distributed.run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from accelerate import Accelerator
from hf_models import CASES

from adsc_kernels.integrations.hf import apply_adsc

MADE = CASES["llava"]


def main() -> None:
    accelerator = Accelerator(cpu=True)
    model = MADE.model()
    applied = apply_adsc(model, "1:1/2,3:1/3")
    model.model.vision_tower.requires_grad_(False)  # its last layer takes no part in the loss
    wrapped = accelerator.prepare(model)
    rows = MADE.rows()[:2]
    row = rows[accelerator.process_index]
    loss = wrapped(**MADE.inputs([row]), labels=torch.tensor([row.ids])).loss
    accelerator.backward(loss)
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    with torch.no_grad():  # the same input on either rank: the same decision
        model(**MADE.inputs(rows))
    state = {"gradients": found, "columns": applied.columns.tolist()}
    torch.save(state, Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
