"""Ways of answering a batch: a prompt, then tokens one after the other, each with its own cache."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from adsc_kernels.baselines import Method, make_method
from adsc_kernels.baselines.batch import Batch
from adsc_kernels.baselines.decoder import Rows, run
from adsc_kernels.baselines.method import InDecoder
from adsc_kernels.cache import Phase
from adsc_kernels.cli.bench_e2e.cases import TEXT, Case, average, schedules_of, tokens_by_layer
from adsc_kernels.cli.bench_e2e.models import Models
from adsc_kernels.graphs import Graphs
from adsc_kernels.llava import Llava
from adsc_kernels.plan import CompressionPlan, make_plan
from adsc_kernels.schedule import CompressionSchedule


class Way(ABC):
    """`tokens`: vision tokens that each layer processes. `weight_bytes`: of its decoder."""

    tokens: list[int]
    weight_bytes: int

    def __init__(self, models: Models, case: Case) -> None:
        self.models, self.case = models, case

    @cached_property
    def x(self) -> Tensor:
        """The prompts' rows, random, [B * length, hidden]."""
        weight = self.models.ours.language_model.embed_tokens.weight
        shape = (self.case.batch * self.case.length, weight.shape[1])
        return torch.randn(shape, dtype=weight.dtype, device=weight.device) * 0.02

    @abstractmethod
    def prefill(self) -> Tensor:
        """The first token of each answer, int64 [B]."""

    @property
    def cache_bytes(self) -> int | None:
        """Of the K and V that are held; None where there are none."""
        return None


class Decoding(Way):
    """One that goes on behind its prompt."""

    @abstractmethod
    def decode(self, tokens: Tensor, steps: int) -> None:
        """So many tokens more, behind the prompt that was run last."""


class Ours(Decoding):
    """The thin model under a schedule, with graphs and a cache that it holds, as a server would."""

    def __init__(
        self, models: Models, case: Case, schedule: CompressionSchedule, vision: int | None = None
    ) -> None:
        super().__init__(
            models, case if vision is None else dataclasses.replace(case, vision=vision)
        )
        self.model = models.ours.with_schedule(schedule)
        self.model.graphs = Graphs()
        self.tokens = tokens_by_layer(schedule, self.case.vision)
        self.weight_bytes = _bytes_of_ours(models)
        self.cache = self.model.new_cache(case.batch)

    def fill(self) -> None:
        """The cache as prompts leave it, with other values in it: to decode behind."""
        plan = self.plan()
        self.cache.fit(plan, extra=self.case.new_tokens - 1)
        for stage in self.cache.stages:
            for rows in (*stage.k, *stage.v):
                rows.normal_()
        self.cache.advance(plan)

    def plan(self) -> CompressionPlan:
        """Of the prompts; made anew for each, and of the time that they take."""
        case, device = self.case, self.model.device
        bounds = [b * case.length for b in range(case.batch + 1)]
        spans = [(b, TEXT[0], case.vision) for b in range(case.batch)]
        return make_plan(self.model.schedule, bounds, spans, device)

    def prefill(self) -> Tensor:
        """As `Way.prefill`."""
        for stage in self.cache.stages:
            stage.lens = (0,) * self.case.batch
        plan = self.plan()
        self.cache.fit(plan, extra=self.case.new_tokens - 1)
        hidden = self.model(self.x, plan, Phase.PREFILL, self.cache)
        return _first_tokens(self.model, hidden, list(accumulate(plan.stages[-1].seq_lens)))

    def decode(self, tokens: Tensor, steps: int) -> None:
        """As `Decoding.decode`."""
        cached = [self.case.length] * self.case.batch
        state = self.model.begin_decode(self.cache, cached, steps)
        for _ in range(steps):
            tokens = self.model.decode(tokens, state).argmax(-1)

    @property
    def cache_bytes(self) -> int | None:
        """As `Way.cache_bytes`."""
        return sum(self.cache.bytes_per_stage)


class Theirs(Decoding):
    """transformers' own decoder, dense."""

    def __init__(self, models: Models, case: Case) -> None:
        super().__init__(models, case)
        self.model = models.theirs
        self.tokens = [case.vision] * models.shape.num_layers
        self.weight_bytes = _bytes_of(self.model)
        known = inspect.signature(type(self.model).forward).parameters
        self.named = "cache" if "cache" in known else "past_key_values"  # 5.24 renamed it

    def _run(self, **inputs: Tensor) -> Tensor:
        cache = {self.named: self.cache}
        out = self.model(**inputs, use_cache=True, logits_to_keep=1, **cache)
        return out.logits[:, -1].argmax(-1)

    def prefill(self) -> Tensor:
        """As `Way.prefill`."""
        from transformers import DynamicCache

        self.cache = DynamicCache()
        return self._run(inputs_embeds=self.x.view(self.case.batch, self.case.length, -1))

    def decode(self, tokens: Tensor, steps: int) -> None:
        """As `Decoding.decode`."""
        for _ in range(steps):
            tokens = self._run(input_ids=tokens[:, None])

    @property
    def cache_bytes(self) -> int | None:
        """As `Way.cache_bytes`."""
        return sum(
            kept.nbytes for layer in self.cache.layers for kept in (layer.keys, layer.values)
        )


class InLayers(Way):
    """A method that scores tokens inside the decoder, on our layers: its prompt, and no cache."""

    def __init__(self, models: Models, case: Case, name: str, budget: int) -> None:
        """Raises UnsupportedError where the method can't go as low."""
        super().__init__(models, case)
        self.model = models.ours
        config = dataclasses.replace(self.model.config, tokens_per_image=case.vision)
        self.method: Method = make_method(name, config, budget=budget)
        self.tokens = self.method.tokens
        self.weight_bytes = _bytes_of_ours(models)

    @cached_property
    def rows(self) -> Rows:
        """Where the prompts lie."""
        case, device = self.case, self.model.device
        lens, span = (case.length,) * case.batch, (TEXT[0], TEXT[0] + case.vision)
        positions = torch.arange(case.length, device=device).repeat(case.batch)
        return Rows(positions, lens, (span,) * case.batch, lens)

    def prefill(self) -> Tensor:
        """As `Way.prefill`."""
        assert isinstance(self.method, InDecoder)
        select = self.method.selector(self.x, self.rows, self._batch())
        hidden, left = run(self.model, self.x, self.rows, select)
        return _first_tokens(self.model, hidden, left.firsts[1:])

    def _batch(self) -> Batch:
        case, numbers = self.case, list(range(self.case.batch))
        tokens, starts = [[0] * case.length] * case.batch, [TEXT[0]] * case.batch
        lens = [case.length] * case.batch
        return Batch(tokens, starts, lens, torch.empty(0), numbers, numbers)


def make_way(name: str, models: Models, case: Case) -> Way:
    """By its name in WAYS. What goes by an average takes that of the schedule of 192.

    Raises UnsupportedError where a method can't go as low.
    """
    depth = models.shape.num_layers
    schedules = schedules_of(depth)
    budget = average(tokens_by_layer(schedules["192"], case.vision))
    if name in schedules:
        return Ours(models, case, schedules[name])
    if name == "before":
        return Ours(models, case, CompressionSchedule.parse(f"0:{budget}/{case.vision}", depth))
    if name in ("dense", "smaller"):
        vision = budget if name == "smaller" else None
        return Ours(models, case, CompressionSchedule.dense(depth), vision)
    return Theirs(models, case) if name == "transformers" else InLayers(models, case, name, budget)


def _first_tokens(model: Llava, hidden: Tensor, ends: Sequence[int]) -> Tensor:
    """Of each answer, by the last of its prompt's rows, which end at `ends`."""
    last = torch.tensor(ends) - 1
    return model.logits(hidden[last.to(hidden.device, non_blocking=True)]).argmax(-1)


def _bytes_of_ours(models: Models) -> int:
    return _bytes_of(models.ours.language_model) + models.ours.head.weight.nbytes


def _bytes_of(module: torch.nn.Module) -> int:
    parameters: Sequence[Tensor] = list(module.parameters())
    return sum(p.nbytes for p in parameters)
