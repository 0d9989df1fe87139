"""One of two processes that share a step: run by test_hf_peft.py under torch.distributed.run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from accelerate import Accelerator
from hf_models import CASES

from adsc_kernels.integrations.hf import apply_adsc

MADE = CASES["llava"]


def shard(model: Any) -> Any:
    """FSDP2, layer by layer; accelerate's own plugin for it wants an accelerator."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(accelerator: Accelerator, wrap: Any) -> dict[str, Any]:
    model = MADE.model()
    applied = apply_adsc(model, "1:1/2,3:1/3")
    model.model.vision_tower.requires_grad_(False)  # its last layer takes no part in the loss
    wrapped = wrap(model)
    rows = MADE.rows()[:2]
    row = rows[accelerator.process_index]
    loss = wrapped(**MADE.inputs([row]), labels=torch.tensor([row.ids])).loss
    accelerator.backward(loss)
    found = {
        name: parameter.grad.full_tensor()
        if isinstance(parameter.grad, DTensor)
        else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    with torch.no_grad():  # the same input on either rank: the same decision
        model(**MADE.inputs(rows))
    return {"gradients": found, "columns": applied.columns.tolist()}


def main() -> None:
    accelerator = Accelerator(cpu=True)
    state = {"ddp": step(accelerator, accelerator.prepare), "fsdp": step(accelerator, shard)}
    torch.save(state, Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
