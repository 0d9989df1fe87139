"""The hooks by which a schedule acts inside one transformers model.

A call goes through three of them. At the model's entry its layout is read from its arguments and
labels follow it; at the decoder's, with the cache in hand, every stage's tables and masks are made;
at each layer the stage's rows, positions and mask take the place of what the decoder hands on.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf import deepstack, mrope
from adsc_kernels.integrations.hf.compat import cache_name, get_cache, parameters
from adsc_kernels.integrations.hf.families import Family
from adsc_kernels.integrations.hf.layout import BatchLayout
from adsc_kernels.integrations.hf.ledger import StagedCache, new_cache, stage_cache
from adsc_kernels.integrations.hf.override import Override
from adsc_kernels.integrations.hf.reading import (
    MASK,
    MASKS,
    MODALITIES,
    SPANS,
    pictures_in,
    pieces_of,
    read_call,
)
from adsc_kernels.integrations.hf.stage_pass import (
    PassInput,
    picture_pass,
    stage_masks,
    text_pass,
)
from adsc_kernels.schedule import CompressionSchedule

ROPE = "position_embeddings"
PASS = "adsc_pass"  # the argument by which a call's layout, and then its stages, travel
Arguments = dict[str, Any]
Call = tuple[tuple[Any, ...], Arguments]


class Patch:
    """The hooks on a model. They are given the modules they act on, so that it holds none of them.

    Attributes:
        schedule: what is dropped where.
        family: the adapter that serves the model.
        decoder: the decoder's name in the model.
        num_layers: decoder layers with a hook.
    """

    def __init__(
        self, model: PreTrainedModel, schedule: CompressionSchedule, family: Family
    ) -> None:
        base = model.base_model
        decoder = getattr(base, family.decoder)
        self.schedule, self.family = schedule, family
        self.decoder = next(name for name, module in model.named_modules() if module is decoder)
        self.num_layers = len(decoder.layers)
        self._last: BatchLayout | None = None  # of the last call with pictures
        self.config_before: Any = None  # the schedule that the model's config held
        self._names = {
            kind: parameters(module.forward)
            for kind, module in (("model", model), ("base", base), ("decoder", decoder))
        }
        self._read: PassInput | None = None  # of the call that is on its way to the decoder
        self._handles: list[RemovableHandle] = []
        self._overrides: list[Override] = []
        if base is not model:
            self._hook(model, self._enter_model)
        self._hook(base, self._enter_base)
        self._handles.append(base.register_forward_hook(self._leave_base, always_call=True))
        self._hook(decoder, self._enter_decoder)
        for number, layer in enumerate(decoder.layers):
            stage = schedule.stage_of_layer(number)
            self._hook(layer, partial(self._enter_layer, number, stage))
        self._override(model, base)

    def _hook(self, module: nn.Module, hook: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _override(self, model: PreTrainedModel, base: nn.Module) -> None:
        if hasattr(model, "prepare_inputs_for_generation"):
            name = "prepare_inputs_for_generation"
            self._overrides.append(Override(model, name, self._prepare, (SPANS,)))
        for kind, (name, _) in MODALITIES.items():
            name = f"get_{name}_features"
            if hasattr(base, name) and "mm_encoder_outputs" in self._names["base"]:
                self._overrides.append(Override(base, name, partial(self._encode, kind)))

    @property
    def columns(self) -> Tensor | None:
        """Of the last call with pictures, int64 [B, S_last] on the host: the column of `input_ids`
        that each row of the logits belongs to, -1 for padding; None before one."""
        return None if self._last is None else torch.from_numpy(self._last.stages[-1].columns)

    def remove(self) -> None:
        """Take all of it back."""
        for handle in self._handles:
            handle.remove()
        for override in self._overrides:
            override.remove()

    # ---- The hooks ----

    def _enter_model(self, module: Any, args: tuple[Any, ...], kwargs: Arguments) -> Call:
        arguments = _named(self._names["model"], args, kwargs)
        read = self._read_call(module.base_model, arguments)
        return (), {**arguments, PASS: read}

    def _enter_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Call:
        arguments = _named(self._names["base"], args, kwargs)
        read = arguments.pop(PASS, None)
        self._read = self._read_call(module, arguments) if read is None else read
        return (), arguments

    def _leave_base(self, *_: Any) -> None:
        """A call that failed on its way to the decoder leaves nothing to the next."""
        self._read = None

    def _read_call(self, base: Any, arguments: Arguments) -> PassInput:
        read = read_call(self.schedule, self.family, base, arguments)
        if read.layout is not None:
            self._last = read.layout
        return read

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Call:
        names = self._names["decoder"]
        arguments = _named(names, args, kwargs)
        read, self._read = self._read, None
        if read is None:
            raise ValueError(f"{self.decoder}: expected a call of the whole model, got one of it")
        x = arguments["inputs_embeds"]
        cache = self._cache(module, arguments)
        for name in ("cache", "past_key_values"):
            arguments.pop(name, None)
        arguments[cache_name(names)] = cache
        if self.family.mrope and self.schedule.positions == "renumber":
            read.axes = mrope.axes(arguments.get("position_ids"), cache, x)
        rows, make = x.new_empty((*x.shape[:2], 0)), self.family.masks
        build = text_pass if read.layout is None else picture_pass
        arguments[PASS] = build(self.schedule, module, cache, read, rows, make)
        if self.family.deepstack:
            deepstack.take(arguments[PASS], arguments)
        return (), arguments

    def _cache(self, decoder: Any, arguments: Arguments) -> StagedCache | None:
        """The cache of the call, which keeps a ledger; the one the decoder would make if none."""
        cache = get_cache(arguments)
        if cache is not None:
            return stage_cache(cache, self.schedule)
        return new_cache(decoder.config, self.schedule) if uses_cache(decoder, arguments) else None

    def _enter_layer(
        self,
        number: int,
        stage: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Arguments,
    ) -> Call:
        given = dict(kwargs)
        for name, what in ((PASS, "the decoder's other arguments"), (ROPE, ROPE)):
            if name not in given:
                raise UnsupportedError(
                    f"{self.decoder}: expected one that hands {what} on to its layers, got "
                    f"{type(module).__name__} without them"
                )
        run = given.pop(PASS)
        x = args[0] if args else given.pop("hidden_states")
        return (run.enter(number, stage, x, given), *args[1:]), given

    # ---- Around methods ----

    def _prepare(self, model: Any, prepare: Any, *args: Any, **kwargs: Any) -> Arguments:
        """A compiled step needs masks of a fixed shape, so they are made before it."""
        spans = kwargs.pop(SPANS, None)
        mask: Any = kwargs.get("attention_mask")  # generate makes one where none is given
        if self.family.blocks is not None and _drops_at_once(get_cache(kwargs)):
            # transformers would make a mask by blocks of layer 0's length, which no layer reads:
            # it leaves one alone that looks made.
            kwargs["attention_mask"] = mask.new_empty((1, 1, 1, 1))
        inputs = prepare(*args, **kwargs)
        if spans is not None and kwargs.get("is_first_iteration"):
            inputs[SPANS] = spans
        cache = get_cache(inputs)
        if cache is not None and cache.is_compileable:
            inputs[MASK] = mask
            if isinstance(cache, StagedCache) and SPANS not in inputs and not pictures_in(inputs):
                inputs[MASKS] = self._masks(model, cache, inputs)
        return inputs

    def _masks(self, model: Any, cache: StagedCache, inputs: Arguments) -> list[Any]:
        decoder = getattr(model.base_model, self.family.decoder)
        shape, device = inputs["input_ids"].shape, inputs["input_ids"].device
        rows = torch.empty((*shape, 0), dtype=model.dtype, device=device)
        config, make = decoder.config, self.family.masks
        return stage_masks(self.schedule, cache, inputs[MASK], rows, config, make)

    def _encode(self, kind: int, base: Any, encode: Any, *args: Any, **kwargs: Any) -> Any:
        """`generate` encodes pictures first and forgets their sizes: write down what they are.
        In a compiled call nobody asks, and it would break the graph."""
        output = encode(*args, **kwargs)
        if hasattr(output, "pooler_output") and not torch.compiler.is_compiling():
            arguments = _named(parameters(encode), args, kwargs)
            output.adsc_pieces = pieces_of(self.family, base, kind, arguments)
        return output


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """All arguments by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _drops_at_once(cache: Any) -> bool:
    """Whether a compiled step's cache holds less in layer 0 than was said."""
    if not isinstance(cache, StagedCache) or not cache.is_compileable:
        return False
    return cache.ledger.missing(cache.ledger.stages[0]) > 0


def uses_cache(decoder: Any, arguments: Arguments) -> bool:
    """Whether the decoder would make a cache: as it is asked, else as its config says."""
    asked = arguments.get("use_cache")
    asked = getattr(decoder.config, "use_cache", False) if asked is None else asked
    checkpoints = getattr(decoder, "gradient_checkpointing", False) and decoder.training
    return bool(asked) and not (checkpoints and torch.is_grad_enabled())
