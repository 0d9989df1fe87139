"""`train`: from a `TrainConfig` to an adapter on disk, resumed where an earlier run stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments, set_seed

from adsc_kernels import checks
from adsc_kernels.adapters import fingerprint, write_facts
from adsc_kernels.hub import find_folder, read_json
from adsc_kernels.integrations.hf import FAMILIES
from adsc_kernels.schedule import CompressionSchedule
from adsc_kernels.training.batches import Conversations, pack, pad
from adsc_kernels.training.config import LoraSettings, TrainConfig
from adsc_kernels.training.curriculum import Curriculum
from adsc_kernels.training.records import Records
from adsc_kernels.training.trainer import DONE, ScheduledTrainer

_STATE = re.compile(r"checkpoint-(\d+)")
STATE_FILES = ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt")


def train(config: TrainConfig) -> Path:
    """Train an adapter; returns its folder, `<out>/adapter`. What is there already is returned.

    A run that was interrupted goes on from its last whole state in `<out>/state`, and ends with the
    weights of one that was not (bit for bit on a CPU). ValueError where `<out>` holds a run of
    another configuration; FloatingPointError where the loss is no number, OSError where a state
    can't be written: both name the last good state, which stays.
    """
    out = Path(config.out)
    adapter, states = out / "adapter", out / "state"
    _claim(out, config)
    if adapter.is_dir():
        return adapter
    last = last_state(states)
    trainer, facts = _trainer(config, states)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        seconds = _add_time(out, facts["started"], trainer)
        trainer.set_schedule(None)
        if trainer.is_world_process_zero():
            training = {**asdict(config), "seconds": seconds}
            # Places on one machine; the devices that it ran on are in `seconds`.
            for name in ("model", "data", "out", "pictures", "device"):
                training.pop(name)
            name = Path(config.model).name if Path(config.model).is_dir() else config.model
            _write(trainer, adapter, facts["schedule"], facts["base"], name, training)
        trainer.accelerator.wait_for_everyone()
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; {_left(states)}") from None
    except (OSError, RuntimeError) as error:
        # torch and safetensors report a full disk as errors of their own.
        if not isinstance(error, OSError) and "write" not in str(error).lower():
            raise
        raise OSError(f"{out}: can't be written ({error}); {_left(states)}") from error
    except BaseException:
        _add_time(out, facts["started"], trainer)
        raise
    return adapter


def last_state(states: Path) -> Path | None:
    """The newest state that was written whole; others, of an interrupted save, are passed over."""
    found = {int(m[1]): p for p in states.glob("checkpoint-*") if (m := _STATE.fullmatch(p.name))}
    whole = [step for step, p in found.items() if (p / DONE).is_file()]
    return found[max(whole)] if whole else None


def lora(settings: LoraSettings, decoder: str) -> Any:
    """PEFT's configuration: the named matrices of the decoder alone, not those of the tower."""
    from peft import LoraConfig

    names = "|".join(map(re.escape, settings.targets))
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf".*{re.escape(decoder)}\..*\.({names})",
        bias="none",
    )


def _trainer(config: TrainConfig, states: Path) -> tuple[ScheduledTrainer, dict[str, Any]]:
    from peft import get_peft_model

    started = time.monotonic()
    records = Records(config.data, config.pictures, skip_malformed=config.skip_malformed)
    if records.skipped:
        left, (number, why) = len(records.skipped), records.skipped[0]
        print(f"{left} records are left out, {number} for one ({why})", file=sys.stderr)
    folder = find_folder(config.model)
    set_seed(config.seed)
    dtype: torch.dtype = getattr(torch, config.dtype)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation=config.attention
    )
    depth = model.config.get_text_config().num_hidden_layers
    schedule = CompressionSchedule.parse(config.schedule, depth)
    curriculum = Curriculum(config.curriculum, schedule, config.steps)
    family = FAMILIES.get(model.config.model_type)
    decoder = "language_model" if family is None else family.decoder
    processor = AutoProcessor.from_pretrained(folder)
    tuned = get_peft_model(model, lora(config.lora, decoder))
    pad_token = processor.tokenizer.pad_token_id or 0
    trainer = ScheduledTrainer(
        model=tuned,
        args=_arguments(config, states),
        train_dataset=Conversations(records, processor, config.max_tokens),
        data_collator=pack if config.packing else (lambda items: pad(items, pad_token)),
        curriculum=curriculum,
        distillation=config.distillation,
    )
    return trainer, {"started": started, "schedule": schedule, "base": fingerprint(folder)}


def _arguments(config: TrainConfig, states: Path) -> TrainingArguments:
    known = TrainingArguments.__dataclass_fields__  # transformers 5 renamed what 4.5x had
    name = next(n for n in ("activation", "gradient") if f"{n}_checkpointing" in known)
    again: dict[str, Any] = {
        f"{name}_checkpointing": True,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }
    device = None if config.device is None else checks.usable_device("device", config.device)
    return TrainingArguments(
        output_dir=str(states),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        warmup_steps=int(config.steps * config.warmup_share),
        lr_scheduler_type="cosine",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it would hide what the run has to stop at
        save_steps=config.save_every,
        save_total_limit=2,  # the last good one while the next is written
        seed=config.seed,
        use_cpu=device is not None and device.type == "cpu",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        **(again if config.gradient_checkpointing else {}),
    )


def _claim(out: Path, config: TrainConfig) -> None:
    """A folder belongs to one configuration, which is written into it."""
    file = out / "config.json"
    mine = json.loads(json.dumps(asdict(config)))
    if file.is_file():
        theirs = read_json(file)
        differing = [key for key in mine if theirs.get(key) != mine[key] and key != "device"]
        if differing:
            got = ", ".join(f"{key} {checks.shown(theirs.get(key))}" for key in differing)
            raise ValueError(f"out {out}: expected a run of this configuration, got one of {got}")
        return
    out.mkdir(parents=True, exist_ok=True)
    _put(file, json.dumps(mine, indent=1) + "\n")


def _put(file: Path, text: str) -> None:
    """At once: the processes of a run read and write the same files."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _write(
    trainer: ScheduledTrainer,
    adapter: Path,
    schedule: CompressionSchedule,
    base: str,
    name: str,
    how: Any,
) -> None:
    """Under another name first, so that the adapter is whole or not there."""
    part = adapter.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(part)
    write_facts(part, schedule, base, name, how)
    os.replace(part, adapter)


def _add_time(out: Path, started: float, trainer: ScheduledTrainer) -> dict[str, float]:
    """Seconds of computing of all of a run's sittings by device, kept in its folder."""
    file = out / "seconds.json"
    seconds: dict[str, float] = read_json(file) if file.is_file() else {}
    device = trainer.args.device.type
    seconds[device] = round(seconds.get(device, 0.0) + time.monotonic() - started, 1)
    if trainer.is_world_process_zero():
        _put(file, json.dumps(seconds) + "\n")
    return seconds


def _left(states: Path) -> str:
    last = last_state(states)
    return "no state was written before" if last is None else f"the last good state is {last}"
