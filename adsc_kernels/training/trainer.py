"""transformers' `Trainer` under a curriculum: schedules change between steps, nothing else does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainerCallback

from adsc_kernels.integrations.hf import AppliedSchedule, apply_adsc, remove_adsc
from adsc_kernels.schedule import CompressionSchedule
from adsc_kernels.training.batches import IGNORED
from adsc_kernels.training.config import DistillationSettings
from adsc_kernels.training.curriculum import Curriculum

DONE = "whole"  # a file in a state's folder, written last


class ScheduledTrainer(Trainer):
    """A Trainer of a model with LoRA, which drops what the curriculum says."""

    def __init__(
        self, *args: Any, curriculum: Curriculum, distillation: DistillationSettings, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.curriculum, self.distillation = curriculum, distillation
        self.applied: AppliedSchedule | None = None
        self.add_callback(_Phases(self))
        self.add_callback(_States())

    def set_schedule(self, schedule: CompressionSchedule | None) -> None:
        """From the next call on; None leaves the model as it came."""
        if self.applied is not None:
            remove_adsc(self.applied.model)
            self.applied = None
        if schedule is not None:
            self.applied = apply_adsc(self.model, schedule)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own loss; under distillation, a share of it is KL from the dense model."""
        # With a cache transformers doesn't look for packed sequences, and masks them as one.
        inputs = {**inputs, "use_cache": False}
        weight = self.distillation.weight
        teacher = self._dense_logits(inputs) if weight else None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if teacher is not None:
            kl = self._divergence(teacher, outputs["logits"], inputs["labels"], num_items_in_batch)
            loss = (1 - weight) * loss + weight * kl
        return (loss, outputs) if return_outputs else loss

    def _dense_logits(self, inputs: dict[str, Any]) -> Tensor:
        """Of the model without adapter and without schedule, which is put back after it."""
        assert self.applied is not None
        schedule, base = self.applied.schedule, self.accelerator.unwrap_model(self.model)
        self.set_schedule(None)
        try:
            with torch.no_grad(), base.disable_adapter():
                given = {name: value for name, value in inputs.items() if name != "labels"}
                return base(**given).logits
        finally:
            self.set_schedule(schedule)

    def _divergence(self, teacher: Tensor, student: Tensor, labels: Tensor, items: Any) -> Tensor:
        """KL over the tokens that predict an answer's, scaled as the model scales its loss."""
        assert self.applied is not None and self.applied.columns is not None
        columns = self.applied.columns.to(labels.device, non_blocking=True)
        asked = labels[:, 1:] != IGNORED
        # Text is in every stage: the rows of student and teacher that predict answers are as many.
        follows = F.pad(asked, (0, 1)).gather(1, columns.clamp(min=0)) & (columns >= 0)
        heat = self.distillation.temperature
        got = (student[follows].float() / heat).log_softmax(-1)
        want = (teacher[:, :-1][asked].float() / heat).log_softmax(-1)
        kl = F.kl_div(got, want, reduction="sum", log_target=True) * heat**2
        if items is None:
            return kl / asked.sum()
        return kl / items * self.accelerator.num_processes


class _Phases(TrainerCallback):
    """Puts on the schedule of each step before it begins."""

    def __init__(self, trainer: ScheduledTrainer) -> None:
        self.trainer, self.phase = trainer, -1

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        losses = [(log["step"], log["loss"]) for log in state.log_history if "loss" in log]
        phase = self.trainer.curriculum.phase(state.global_step, losses)
        if phase != self.phase:
            self.phase = phase
            self.trainer.set_schedule(self.trainer.curriculum.phases[phase])


class _States(TrainerCallback):
    """Stops at a loss that is no number, before a state is written of it; marks whole states."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name}: expected a finite number, got {value} by step {state.global_step}"
                )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / DONE).touch()
