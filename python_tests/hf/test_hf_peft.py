"""LoRA on a patched model, and two processes that train one: the extra `hf` brings peft."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import CASES
from hf_oracle import oracle

from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.hf import apply_adsc, remove_adsc

MADE = CASES["llava"]
SCHEDULE = "1:1/2,3:1/3"


@pytest.mark.parametrize("first", ["lora", "adsc"])
def test_lora_and_a_schedule_on_one_model(first):
    peft = pytest.importorskip("peft")
    model, row = MADE.model(), MADE.rows()[0]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if first == "adsc":
        apply_adsc(model, SCHEDULE)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config)
    if first == "lora":
        apply_adsc(tuned, SCHEDULE)
    tuned.eval()
    inputs = MADE.inputs([row])
    loss = tuned(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert trained
    assert all(
        p.grad is not None
        for name, p in tuned.named_parameters()
        if "language" in name and p.requires_grad
    )
    with torch.no_grad():
        got = tuned(**inputs).logits[0]
        answer = tuned.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        remove_adsc(tuned)
        want, _ = oracle(model, inputs, row.grids, CompressionSchedule.parse(SCHEDULE, 4))
    assert torch.allclose(got, want, atol=1e-4)
    assert answer.shape == (1, len(row.ids) + 4)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """DDP under accelerate on CPUs: gradients are those of the whole batch, on either rank."""
    pytest.importorskip("accelerate")
    here = Path(__file__).with_name("hf_two_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(here), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert ranks[0]["columns"] == ranks[1]["columns"]
    model = MADE.model()
    with apply_adsc(model, SCHEDULE):
        rows = MADE.rows()[:2]
        loss = sum(model(**MADE.inputs([row]), labels=torch.tensor([row.ids])).loss for row in rows)
        (loss / 2).backward()
    for name, parameter in model.named_parameters():
        for rank in ranks:
            if parameter.grad is not None and "vision_tower" not in name:
                assert torch.allclose(rank["gradients"][name], parameter.grad, atol=1e-6)
