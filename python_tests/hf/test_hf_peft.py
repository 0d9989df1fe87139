"""Others on a patched model: LoRA, Trainer, two processes that train one, quantized weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from hf_models import CASES, IMAGE, PAD
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
    """DDP under accelerate and FSDP2, on CPUs: gradients are the whole batch's, on either rank."""
    pytest.importorskip("accelerate")
    here = Path(__file__).with_name("hf_two_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(here), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    with torch.device("cpu"), apply_adsc(model := MADE.model(), SCHEDULE):
        rows = MADE.rows()[:2]
        loss = sum(model(**MADE.inputs([row]), labels=torch.tensor([row.ids])).loss for row in rows)
        (loss / 2).backward()
    want = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "vision_tower" not in name
    }
    for kind in ("ddp", "fsdp"):
        one, two = (rank[kind] for rank in ranks)
        assert one["columns"] == two["columns"]
        for got in (one["gradients"], two["gradients"]):
            assert set(got) >= set(want)
            for name, gradient in want.items():
                assert torch.allclose(got[name], gradient, atol=1e-6), (kind, name)


def test_a_trainer_trains_a_patched_model(tmp_path):
    """Its loss, over all labels of a batch, is that of the rows that are left."""
    pytest.importorskip("accelerate")
    model, rows = MADE.model(), MADE.rows()[:2]
    batch = MADE.inputs(rows, "right")
    labels = batch["input_ids"].clone()
    labels[(labels == IMAGE) | (labels == PAD)] = -100
    labels[:, 0] = -100  # nothing predicts it
    arguments = hf.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        use_cpu=torch.get_default_device().type == "cpu",
    )
    with apply_adsc(model.train(), SCHEDULE):
        want = float(model(**batch, labels=labels).loss.detach())
        trainer = hf.Trainer(
            model,
            arguments,
            data_collator=lambda items: {**batch, "labels": labels},
            train_dataset=[0, 1],
        )
        before = model.lm_head.weight.detach().clone()
        with torch.device("cpu"):  # the sampler's generator is there
            trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want, rel=1e-4)
    assert not torch.equal(model.lm_head.weight, before)


class Int8Linear(torch.nn.Module):
    """Weights of int8 with a scale for each row, as quantizing libraries put in Linear's place."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def by_hand(decoder: torch.nn.Module) -> None:
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int8Linear(child))


def by_torchao(decoder: torch.nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(decoder, quantization.Int8WeightOnlyConfig())


@torch.no_grad()
@pytest.mark.parametrize("quantize", [by_hand, by_torchao])
def test_quantized_weights_go_on_working(quantize):
    model, row = MADE.model(), MADE.rows()[0]
    inputs = MADE.inputs([row])
    with apply_adsc(model, SCHEDULE):
        plain = model(**inputs).logits[0]
    quantize(model.base_model.language_model)
    want, _ = oracle(model, inputs, row.grids, CompressionSchedule.parse(SCHEDULE, 4))
    with apply_adsc(model, SCHEDULE):
        got = model(**inputs).logits[0]
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, disable_compile=True)
        dynamic = model.generate(**inputs, **options)
        static = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.allclose(got, want, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-3)
    assert torch.equal(dynamic, static)
