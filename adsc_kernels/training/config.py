"""What a training run is told: a YAML file, read into `TrainConfig`, all of it checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from adsc_kernels import checks

DIRECTIONS = ("constant", "strong_to_mild", "mild_to_strong")
PACES = ("steps", "plateau")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """The adapter: on the decoder's matrices of these names."""

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        checks.integer("lora.rank", self.rank, 1, 2**16)
        checks.number("lora.alpha", self.alpha, above=0)
        if checks.number("lora.dropout", self.dropout, 0, 1) == 1:
            raise ValueError("lora.dropout: expected below 1, got 1")
        if not checks.sequence("lora.targets", self.targets, str):
            raise ValueError("lora.targets: expected at least one name, got none")


@dataclass(frozen=True)
class CurriculumSettings:
    """Schedules to go through on the way to the run's own, which comes last.

    direction: "strong_to_mild" goes through stronger ones, the strongest first, "mild_to_strong"
      through milder ones, the mildest first; "constant" through none.
    through: their texts, in any order.
    pace: "steps" shares the time in front of the last phase evenly; "plateau" moves on before that
      where the loss, averaged over `patience` logs, has not fallen by `least_gain` of itself.
    last_share: of all steps, that the run's own schedule has at least.
    """

    direction: str = "constant"
    through: tuple[str, ...] = ()
    pace: str = "steps"
    last_share: float = 0.5
    patience: int = 5
    least_gain: float = 0.01

    def __post_init__(self) -> None:
        checks.choice("curriculum.direction", self.direction, DIRECTIONS)
        checks.choice("curriculum.pace", self.pace, PACES)
        checks.sequence("curriculum.through", self.through, str)
        checks.number("curriculum.last_share", self.last_share, most=1, above=0)
        checks.integer("curriculum.patience", self.patience, 1, 10_000)
        checks.number("curriculum.least_gain", self.least_gain, 0, 1)
        if (self.direction == "constant") != (not self.through):
            want = "none" if self.direction == "constant" else "some schedules"
            got = f"{list(self.through)} with {self.direction!r}"
            raise ValueError(f"curriculum.through: expected {want}, got {got}")


@dataclass(frozen=True)
class DistillationSettings:
    """KL from the dense model's answer tokens; a weight of 0 leaves it out, and its cost too."""

    weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        checks.number("distillation.weight", self.weight, 0, 1)
        checks.number("distillation.temperature", self.temperature, above=0)


@dataclass(frozen=True)
class TrainConfig:
    """A run. Texts name files and schedules; counts are of optimizer steps and of conversations.

    model: a folder or an id on the hub. data, pictures: as `Records` takes them.
    out: the run's folder: `adapter/` in the end, `state/` on the way.
    schedule: what the adapter is trained for; an empty text is dense.
    batch_size: conversations of a forward pass on each device; `accumulate` such make a step.
    packing: they share one row, told apart by positions; else they are padded.
    save_every: steps from one state on disk to the next; a multiple of `log_every`.
    """

    model: str
    data: str
    out: str
    schedule: str
    steps: int
    pictures: str | None = None
    skip_malformed: bool = False
    batch_size: int = 8
    accumulate: int = 1
    packing: bool = False
    max_tokens: int = 4096
    learning_rate: float = 2e-4
    warmup_share: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: str = "float32"
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    device: str | None = None
    workers: int = 0
    seed: int = 0
    log_every: int = 10
    save_every: int = 100
    lora: LoraSettings = field(default_factory=LoraSettings)
    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)

    def __post_init__(self) -> None:
        for name in ("model", "data", "out"):
            if not checks.instance(name, getattr(self, name), str):
                raise ValueError(f"{name}: expected a name, got an empty text")
        checks.instance("schedule", self.schedule, str)
        checks.at_least(1, steps=self.steps, batch_size=self.batch_size)
        checks.at_least(1, accumulate=self.accumulate, max_tokens=self.max_tokens)
        checks.at_least(1, log_every=self.log_every, save_every=self.save_every)
        checks.at_least(0, workers=self.workers)
        checks.integer("seed", self.seed, 0, 2**32 - 1)
        for name in ("packing", "skip_malformed", "gradient_checkpointing"):
            checks.flag(name, getattr(self, name))
        checks.number("learning_rate", self.learning_rate, above=0)
        checks.number("warmup_share", self.warmup_share, 0, 1)
        checks.number("weight_decay", self.weight_decay, 0)
        checks.number("max_grad_norm", self.max_grad_norm, above=0)
        checks.choice("dtype", self.dtype, ("float32", "bfloat16"))
        checks.choice("attention", self.attention, ("sdpa", "eager", "flash_attention_2"))
        if self.save_every % self.log_every:
            # A loss is looked at when it is logged: no state is written of one that nobody saw.
            want = f"a multiple of log_every, {self.log_every}"
            raise ValueError(f"save_every: expected {want}, got {self.save_every}")

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """Read a YAML file; names of files in it are taken from the working folder."""
        import yaml

        file = checks.path("config", path)
        if not file.is_file():
            raise FileNotFoundError(f"config {file}: no such file")
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"config {file}: no YAML ({' '.join(str(error).split())})") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: object) -> TrainConfig:
        """From plain values; TypeError or ValueError that names the key."""
        given = dict(_keys(cls, "config", data))
        for name, kind in _PARTS.items():
            if name in given:
                part = dict(_keys(kind, name, given[name]))
                given[name] = kind(**{key: _value(value) for key, value in part.items()})
        return cls(**given)


_PARTS: dict[str, Any] = {
    "lora": LoraSettings,
    "curriculum": CurriculumSettings,
    "distillation": DistillationSettings,
}


def _value(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _keys(kind: Any, name: str, data: object) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise TypeError(f"{name}: expected keys and values, got {checks.kind(data)}")
    known = {f.name: f for f in fields(kind)}
    for key in data:
        if key not in known:
            raise ValueError(f"{name}: expected keys among {', '.join(known)}, got {key!r}")
    for key, spec in known.items():
        if spec.default is MISSING and spec.default_factory is MISSING and key not in data:
            raise ValueError(f"{name}: expected the key {key}, got none")
    return data
