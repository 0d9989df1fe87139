"""`apply_adsc` and `remove_adsc`: a schedule acts inside a transformers model, or no longer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf.families import FAMILIES, Family
from adsc_kernels.integrations.hf.hooks import Patch
from adsc_kernels.schedule import CONFIG_KEY, CompressionSchedule

ATTRIBUTE = "_adsc_patch"


class AppliedSchedule:
    """What `apply_adsc` did; as a context manager it is undone at the end.

    Attributes:
        model: the model with the hooks.
        schedule: what is dropped where.
        family: the adapter that serves the model.
        decoder: the decoder's name in the model.
        num_layers: decoder layers with a hook.
    """

    def __init__(self, model: PreTrainedModel, patch: Patch) -> None:
        self.model, self.schedule, self.family = model, patch.schedule, patch.family
        self.decoder, self.num_layers = patch.decoder, patch.num_layers

    @property
    def columns(self) -> Tensor | None:
        """Of the last call with pictures, int64 [B, S_last] on the host: the column of `input_ids`
        that each row of the logits belongs to, -1 for padding. None before the first one."""
        patch = getattr(self.model, ATTRIBUTE, None)
        return None if patch is None else patch.columns

    def __enter__(self) -> AppliedSchedule:
        return self

    def __exit__(self, *_: object) -> None:
        remove_adsc(self.model)

    def __repr__(self) -> str:
        return (
            f"AppliedSchedule({str(self.schedule)!r} on {self.family.model_type}, hooks on the "
            f"{self.num_layers} layers of {self.decoder})"
        )


def apply_adsc(
    model: nn.Module, schedule: CompressionSchedule | str | None = None
) -> AppliedSchedule:
    """Drop vision tokens inside a transformers model, on this object alone.

    model: a vision-language model of a family in `FAMILIES`, or a PEFT model around one.
    schedule: for the depth of its decoder, or the text of one; None takes what the model's config
      holds, which `save_pretrained` has kept. It is written into the config.
    Returns what was touched, which as a context manager is undone at the end; see `remove_adsc`.

    From then on logits are of the tokens that reach the last layer, loss and labels follow them,
    and the cache of each stage is as short as the stage. Raises TypeError, ValueError (another
    depth, no schedule, a second call) or UnsupportedError that names what is missing.
    """
    model = _unwrap(model)
    if getattr(model, ATTRIBUTE, None) is not None:
        raise ValueError(
            "model: expected one without a schedule, got one patched: remove_adsc first"
        )
    family = _family(model)
    decoder = _decoder(model, family)
    schedule = _schedule(model, schedule, len(decoder.layers))
    patch = Patch(model, schedule, family)
    patch.config_before = getattr(model.config, CONFIG_KEY, None)
    setattr(model, ATTRIBUTE, patch)
    setattr(model.config, CONFIG_KEY, schedule.to_dict())
    return AppliedSchedule(model, patch)


def remove_adsc(model: nn.Module) -> None:
    """Undo `apply_adsc`; the config holds what it held before. ValueError where there is none."""
    model = _unwrap(model)
    patch: Patch | None = getattr(model, ATTRIBUTE, None)
    if patch is None:
        raise ValueError("model: expected one that apply_adsc has patched, got one that it hasn't")
    patch.remove()
    delattr(model, ATTRIBUTE)
    if patch.config_before is None:
        delattr(model.config, CONFIG_KEY)
    else:
        setattr(model.config, CONFIG_KEY, patch.config_before)


def _unwrap(model: Any) -> PreTrainedModel:
    """A PEFT model's own model, or the model."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        got = type(model).__name__
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {got}")
    return model


def _family(model: PreTrainedModel) -> Family:
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedError(
            f"model: expected one of {known}, got {model.config.model_type}; an adapter for it can "
            "be added with adsc_kernels.integrations.hf.register"
        )
    return family


def _decoder(model: PreTrainedModel, family: Family) -> Any:
    decoder = getattr(model.base_model, family.decoder, None)
    for name, fits in (
        (family.decoder, decoder is not None),
        (f"{family.decoder}.layers", hasattr(decoder, "layers")),
        (f"{family.decoder}.rotary_emb", hasattr(decoder, "rotary_emb")),
    ):
        if not fits:
            raise UnsupportedError(f"model: expected {name}, got {type(model).__name__} without it")
    return decoder


def _schedule(
    model: PreTrainedModel, schedule: CompressionSchedule | str | None, num_layers: int
) -> CompressionSchedule:
    if schedule is None:
        kept = getattr(model.config, CONFIG_KEY, None)
        if kept is None:
            raise ValueError("schedule: expected one, as the model's config holds none; got None")
        return CompressionSchedule.of_config(kept, num_layers)
    if isinstance(schedule, str):
        schedule = CompressionSchedule.parse(schedule, num_layers)
    if not isinstance(schedule, CompressionSchedule):
        got = type(schedule).__name__
        raise TypeError(f"schedule: expected a CompressionSchedule or its text, got {got}")
    if schedule.num_layers != num_layers:
        raise ValueError(
            f"schedule: expected one for {num_layers} layers, got one for {schedule.num_layers}"
        )
    return schedule
