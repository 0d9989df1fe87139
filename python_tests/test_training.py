"""adsc train on the bundled model: resumed, stopped and shared runs, adapters, distillation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_checkpoint
from torch._dynamo.testing import CompileCounter
from training_case import MODEL, STRONG, config, write_data
from transformers import LlavaForConditionalGeneration

from adsc_kernels import CompressionSchedule, apply_adsc
from adsc_kernels.adapters import merge, read_schedule
from adsc_kernels.cli import main
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.llava import Llava, load_image
from adsc_kernels.weights import Joined

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
from adsc_kernels.training import run as training  # noqa: E402
from adsc_kernels.training import trainer as trainers  # noqa: E402
from adsc_kernels.training.run import train  # noqa: E402

CURRICULUM = {"direction": "strong_to_mild", "through": ["0:1/12x1/12@grid"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def adapter(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps under a curriculum, with dropout, uninterrupted."""
    return train(
        config(
            data,
            tmp_path_factory.mktemp("run"),
            curriculum=CURRICULUM,
            lora={"rank": 4, "dropout": 0.1},
        )
    )


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


# ---- Runs ----


def test_an_interrupted_run_ends_with_the_same_bits(
    data: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = config(data, tmp_path, curriculum=CURRICULUM, lora={"rank": 4, "dropout": 0.1})
    step = trainers.ScheduledTrainer.training_step
    done: list[int] = []

    def stop_at_the_fourth(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(self.state.global_step)
        if done[-1] == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.ScheduledTrainer, "training_step", stop_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            train(same)
    assert training.last_state(tmp_path / "state").name == "checkpoint-2"
    (tmp_path / "state" / "checkpoint-4").mkdir()  # as a save that was cut short leaves it
    steps: list[int] = []
    monkeypatch.setattr(
        trainers.ScheduledTrainer,
        "training_step",
        lambda self, *a, **k: (steps.append(self.state.global_step), step(self, *a, **k))[1],
    )
    got = weights(train(same))
    assert steps == [2, 3]
    want = weights(adapter)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert any(tensor.any() for name, tensor in want.items() if "lora_B" in name)


def test_a_folder_belongs_to_one_configuration(data: Path, adapter: Path) -> None:
    out = adapter.parent
    same = config(data, out, curriculum=CURRICULUM, lora={"rank": 4, "dropout": 0.1})
    assert train(same) == adapter  # nothing is left to be done
    with pytest.raises(ValueError, match=r"out .*: expected a run of this .* got one of seed 0"):
        train(config(data, out, curriculum=CURRICULUM, lora={"rank": 4, "dropout": 0.1}, seed=1))


def test_a_loss_that_is_no_number_stops_before_a_state_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = trainers.ScheduledTrainer.compute_loss

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(trainers.ScheduledTrainer, "compute_loss", spoiled)
    with pytest.raises(FloatingPointError, match=r"loss: .* got nan by step 4; .*checkpoint-2"):
        train(config(data, tmp_path, steps=4))
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["checkpoint-2"]


def test_a_full_disk_leaves_the_last_good_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(what: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        save(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left .*the last good state is .*checkpoint-2"):
        train(config(data, tmp_path))
    assert training.last_state(tmp_path / "state").name == "checkpoint-2"


def gradients(out: Path) -> list[torch.Tensor]:
    """Of a run of one step: Adam's first moments are a tenth of them.

    Weights won't do: Adam moves them by its full rate wherever a gradient is all but 0.
    """
    state = torch.load(out / "state" / "checkpoint-1" / "optimizer.pt")["state"]
    return [state[n]["exp_avg"] for n in sorted(state)]


def assert_same_gradients(one: Path, other: Path) -> None:
    pairs = list(zip(gradients(one), gradients(other), strict=True))
    assert len(pairs) == 2 * 7 * 16
    assert sum(float(a.norm()) for a, _ in pairs) > 0.01
    for a, b in pairs:
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-7)


def test_records_that_are_left_out_are_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_data(tmp_path / "bad")
    records = json.loads((bad / "conversations.json").read_text())
    records[2]["image"] = "none.png"
    (bad / "conversations.json").write_text(json.dumps(records))
    with pytest.raises(FileNotFoundError, match="record 2: image"):
        made_trainer(bad, tmp_path)
    trainer = made_trainer(bad, tmp_path, skip_malformed=True)
    assert len(trainer.train_dataset) == 7
    assert "1 records are left out, 2 for one" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    """Each takes one of two questions of a step, whose answers differ in length."""
    here = Path(__file__).with_name("training_two_ranks.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(here), str(data), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    train(config(data, tmp_path / "one", steps=1, save_every=1))
    assert_same_gradients(tmp_path / "one", tmp_path / "two")


def test_packed_sequences_train_as_padded_ones(data: Path, tmp_path: Path) -> None:
    for packing in (True, False):
        name = str(packing)
        train(config(data, tmp_path / name, steps=1, save_every=1, packing=packing))
    assert_same_gradients(tmp_path / "True", tmp_path / "False")


# ---- Distillation and phases ----


def made_trainer(data: Path, out: Path, **changes: Any) -> Any:
    trainer, _ = training._trainer(config(data, out, **changes), out / "state")
    return trainer


def test_distillation_is_kl_from_the_dense_model_on_answers(data: Path, tmp_path: Path) -> None:
    trainer = made_trainer(data, tmp_path, distillation={"weight": 0.25, "temperature": 2.0})
    model = trainer.model.eval()
    items = [trainer.train_dataset[n] for n in range(3)]
    inputs = trainer.data_collator(items)
    teacher = LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
        trainer.set_schedule(CompressionSchedule.parse(STRONG, 16))
        got = float(trainer.compute_loss(model, dict(inputs)))
        total, count, cross = 0.0, 0, 0.0
        for item in items:
            student = model(**item)
            answers = student.logits.shape[1] - item["labels"].shape[1]  # rows dropped in front
            dense = teacher(**{n: v for n, v in item.items() if n != "labels"}).logits
            for at in (item["labels"][0] != -100).nonzero()[:, 0].tolist():
                p = (dense[0, at - 1] / 2).log_softmax(-1)
                q = (student.logits[0, at - 1 + answers] / 2).log_softmax(-1)
                total += float((p.exp() * (p - q)).sum()) * 4
                cross -= float(
                    student.logits[0, at - 1 + answers].log_softmax(-1)[item["labels"][0, at]]
                )
                count += 1
    assert trainer.applied.schedule == CompressionSchedule.parse(STRONG, 16)
    assert got == pytest.approx(0.75 * cross / count + 0.25 * total / count, rel=1e-4)
    assert total > 0.01


def test_phases_change_what_is_dropped_and_compile_nothing_anew(data: Path, tmp_path: Path) -> None:
    trainer = made_trainer(data, tmp_path)
    inputs = trainer.data_collator([trainer.train_dataset[n] for n in range(2)])
    counter = CompileCounter()
    layers = trainer.model.base_model.model.model.language_model.layers
    for layer in layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend=counter, dynamic=True)
    seen = []
    for text in ("2:1/12x1/12@grid", "1:1/6x1/6@grid", "0:1/4x1/4@grid"):
        trainer.set_schedule(CompressionSchedule.parse(text, 16))
        with torch.no_grad():
            seen.append(trainer.model(**inputs).logits.shape[1])
        if len(seen) == 1:
            first = counter.frame_count
    assert seen == [seen[0], seen[0] + 12, seen[0] + 32]
    assert 0 < first == counter.frame_count


# ---- Adapters ----


def spoil(adapter: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of an adapter with other settings."""
    copy = tmp_path / "spoiled"
    copy.mkdir()
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    old = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**old, **config}))
    return copy


@torch.no_grad()
def test_the_thin_model_and_peft_read_an_adapter_alike(adapter: Path) -> None:
    thin = Llava.from_pretrained(MODEL, None, "cpu", torch.float32, adapter=adapter)
    assert thin.schedule == read_schedule(adapter) == CompressionSchedule.parse(STRONG, 16)
    base = LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tuned = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    theirs = dict(tuned.model.language_model.named_parameters())
    for file in adapter.iterdir():
        if file.suffix in (".json", ".md"):
            assert str(MODEL) not in file.read_text(), file
    ours = dict(thin.language_model.named_parameters())
    for path, module in thin.language_model.named_modules():
        if isinstance(module, Joined):
            parts = ours.pop(f"{path}.weight").split(list(module.parts.values()))
            above = path.rpartition(".")[0]
            ours |= {f"{above}.{n}.weight": p for n, p in zip(module.parts, parts, strict=True)}
    assert ours.keys() == theirs.keys()
    moved = 0
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name
        moved += not torch.equal(tensor, plain[f"model.language_model.{name}"])
    assert moved == 16 * 7
    file = next((MODEL / "pictures").glob("*.png"))
    prompt = "USER: <image>\nRead the digits. ASSISTANT:"
    got = thin.generate([prompt], [[load_image(file)]], max_new_tokens=12)
    with apply_adsc(tuned, read_schedule(adapter)):
        from transformers import AutoProcessor

        inputs = AutoProcessor.from_pretrained(MODEL)(
            text=[prompt], images=[load_image(file)], return_tensors="pt"
        )
        out = tuned.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == got.token_ids[0]


def test_another_schedule_or_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    Llava.from_pretrained(MODEL, STRONG, "cpu", adapter=adapter)
    with pytest.raises(ValueError, match="which the adapter was trained under, got '4:1/4'"):
        Llava.from_pretrained(MODEL, "4:1/4", "cpu", adapter=adapter)
    make_checkpoint(tmp_path / "tiny", layers=16)
    with pytest.raises(ValueError, match="expected one of this model, got one of another"):
        Llava.from_pretrained(tmp_path / "tiny", None, "cpu", adapter=adapter)
    make_checkpoint(tmp_path / "shallow")
    with pytest.raises(ValueError, match="of 16 layers, which the adapter"):
        Llava.from_pretrained(tmp_path / "shallow", None, "cpu", adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"use_dora": True}, UnsupportedError, "plain LoRA, got use_dora True"),
        ({"peft_type": "IA3"}, UnsupportedError, "peft_type"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedError, "modules_to_save"),
        ({"r": 5}, ValueError, "of rank 5"),
    ],
)
def test_an_adapter_that_is_no_plain_lora(
    adapter: Path, tmp_path: Path, changes: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Llava.from_pretrained(MODEL, None, "cpu", adapter=spoil(adapter, tmp_path, **changes))


def test_a_damaged_adapter_changes_nothing(adapter: Path, tmp_path: Path) -> None:
    copy = spoil(adapter, tmp_path)
    tensors = weights(copy)
    first = next(name for name in tensors if "lora_A" in name)
    save_file(
        {**tensors, first: tensors[first][:, :-1].contiguous()}, copy / "adapter_model.safetensors"
    )
    found = {
        "language_model.norm.weight": load_file(MODEL / "model.safetensors")[
            "language_model.model.norm.weight"
        ]
    }
    before = dict(found)
    with pytest.raises(ValueError, match="expected a weight"):
        merge(found, copy, lambda name: name.removeprefix("model."))
    assert found == before
    (copy / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        Llava.from_pretrained(MODEL, None, "cpu", adapter=copy)
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Llava.from_pretrained(MODEL, None, "cpu", adapter=copy)


# ---- The command ----


def test_the_command_trains_and_runs_the_adapter(
    data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {MODEL}\ndata: {data}\nout: {tmp_path / 'run'}\nschedule: '{STRONG}'\n"
        "steps: 1\nbatch_size: 1\nlog_every: 1\nsave_every: 1\ndevice: cpu\n"
    )
    assert main(["train", "--config", str(file)]) == 0
    made = capsys.readouterr().out.splitlines()[-1]
    assert made == str(tmp_path / "run" / "adapter")
    asked = ["run", "--adapter", made, "--runs", "1", "--max-new-tokens", "1"]
    asked += ["--ask", "Read row 2.", "--out", str(tmp_path / "out.png")]
    assert main([*asked, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"]["adapter"] == made
    assert main([*asked, "--schedule", "4:1/4"]) == 2
    assert "which the adapter was trained under" in capsys.readouterr().err
    file.write_text(file.read_text() + "stepz: 3\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "stepz" in capsys.readouterr().err
