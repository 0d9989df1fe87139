"""What a call's arguments say of its layout, read on the host.

A call has pictures if it is given some, never because of its length: so a prompt, a later turn, a
draft to verify and a decode step are told apart, whatever tokens they hold. Only a call with
pictures reads its tokens, in one copy to the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf.compat import get_cache
from adsc_kernels.integrations.hf.families import Family
from adsc_kernels.integrations.hf.layout import BatchLayout
from adsc_kernels.integrations.hf.mrope import Pictures
from adsc_kernels.integrations.hf.pictures import Piece, Span, place, runs
from adsc_kernels.integrations.hf.stage_pass import VARLEN, PassInput
from adsc_kernels.schedule import CompressionSchedule

# Arguments of ours, beside the model's own.
SPANS, MASK, MASKS = "vision_spans", "adsc_attention_mask", "adsc_stage_masks"
MODALITIES = {1: ("image", "pixel_values"), 2: ("video", "pixel_values_videos")}
HOW = (
    "(row, column, length[, height, width]) of each picture, counted in this call's tokens; an "
    "empty list where there are none"
)


def pictures_in(arguments: dict[str, Any]) -> list[int]:
    """Which modalities a call has pictures of."""
    encoded = arguments.get("mm_encoder_outputs")
    encoded = encoded if isinstance(encoded, dict) else {}
    return [
        kind
        for kind, (name, pixels) in MODALITIES.items()
        if arguments.get(pixels) is not None or encoded.get(name) is not None
    ]


def read_call(
    schedule: CompressionSchedule, family: Family, base: Any, arguments: dict[str, Any]
) -> PassInput:
    """Take our own arguments out of a call's, and find out its layout; labels follow it.

    Raises ValueError or UnsupportedError where the layout can't be told.
    """
    spans, masks = arguments.pop(SPANS, None), arguments.pop(MASKS, None)
    given = arguments.get("attention_mask")
    mask = arguments.pop(MASK) if MASK in arguments else given
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise UnsupportedError(
            f"attention_mask: expected one of shape [B, cached + S], got {_shape(mask)}"
        )
    kinds = pictures_in(arguments)
    if spans is None and not kinds and _is_told(arguments):
        return PassInput(None, mask, masks)
    return _read_layout(schedule, family, base, arguments, mask, kinds, spans)


@torch.compiler.disable
def _read_layout(
    schedule: CompressionSchedule,
    family: Family,
    base: Any,
    arguments: dict[str, Any],
    mask: Tensor | None,
    kinds: list[int],
    spans: Any,
) -> PassInput:
    """Of a call with pictures: lists and numpy, which Dynamo would take apart."""
    reader = _Reader(family, base, arguments, mask)
    if spans is None:
        spans = reader.spans(kinds)
    spans = [tuple(span) for span in spans]
    layout = BatchLayout(schedule, reader.real, spans, reader.starts)
    _follow(layout, arguments)
    pictures = None
    if family.mrope and schedule.positions == "renumber":
        pictures = Pictures.of(spans, reader.kinds, reader.starts)
    return PassInput(
        layout,
        mask,
        hides=reader.hides,
        block_ids=reader.block_ids,
        is_varlen=arguments.get(VARLEN[0]) is not None,
        pictures=pictures,
    )


def _is_told(arguments: dict[str, Any]) -> bool:
    """A call without pictures: of tokens, or of embeddings of which nothing says they are text."""
    if arguments.get("input_ids") is None and arguments.get("mm_token_type_ids") is None:
        raise ValueError(f"{SPANS}: expected with inputs_embeds, {HOW}; got none")
    return arguments.get("input_ids") is not None


def _shape(mask: Any) -> str:
    return f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__


class _Reader:
    """The tokens of a call on the host.

    Attributes:
        kinds: [B, S], 0 for text, 1 and 2 for the placeholders of images and videos.
        real: bool [B, S], False for padding.
        starts: bool [B, S], where packed sequences begin; None where each row is one sequence.
        hides: there are zeros in the mask, of cached columns or new ones.
        block_ids: [B, S] on the device, for families that have them.
    """

    def __init__(
        self, family: Family, base: Any, arguments: dict[str, Any], mask: Tensor | None
    ) -> None:
        self.family, self.base, self.arguments = family, base, arguments
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        tokens: Any = embeds if ids is None else ids
        batch, width = tokens.shape[:2]
        cache = get_cache(arguments)
        seen = 0 if cache is None else int(cache.get_seq_length())
        if mask is not None and mask.shape != (batch, seen + width):
            raise ValueError(
                f"attention_mask: expected shape {(batch, seen + width)}, cached columns and new "
                f"ones, got {tuple(mask.shape)}"
            )
        kinds = self._kinds(ids, width, tokens)
        ones = torch.ones((batch, seen + width), dtype=torch.int8, device=tokens.device)
        real = ones if mask is None else mask.to(tokens.device).ne(0).to(torch.int8)
        starts = self._starts(mask, seen, batch, kinds)
        on_host = torch.cat([kinds, starts, real], 1).cpu().numpy()
        self.kinds = on_host[:, :width]
        self.real = on_host[:, -width:].astype(bool)
        begins = on_host[:, width : 2 * width].astype(bool)
        self.starts = begins if begins[:, 1:].any() else None
        self.hides = not on_host[:, 2 * width :].all()
        types = arguments.get("token_type_ids")
        self.block_ids = None
        if family.blocks is not None and types is not None:
            self.block_ids = family.blocks(types)[:, -width:]

    def _kinds(self, ids: Tensor | None, width: int, tokens: Tensor) -> Tensor:
        types = self.arguments.get("mm_token_type_ids")
        if ids is not None:
            kinds = torch.zeros_like(ids, dtype=torch.int8)
            for kind, token in self.family.tokens(self.base.config).items():
                kinds.masked_fill_(ids == token, kind)
            return kinds
        if types is not None:
            return types[:, -width:].to(torch.int8)
        return torch.zeros(tokens.shape[:2], dtype=torch.int8, device=tokens.device)

    def _starts(self, mask: Tensor | None, seen: int, batch: int, kinds: Tensor) -> Tensor:
        """Where positions don't go on, as transformers tells packed sequences apart."""
        ids = self.arguments.get("position_ids")
        if ids is not None and ids.dim() == 3:
            ids = ids[0] if len(ids) == 4 else None  # M-RoPE: text positions, or none among them
        if mask is not None or seen or ids is None:
            return torch.zeros_like(kinds)
        ids = ids.expand(batch, -1)
        return ids.diff(prepend=ids[:, :1] - 1, dim=1).ne(1).to(torch.int8)

    def spans(self, modalities: list[int]) -> list[Span]:
        """Of the pictures of the call."""
        if not modalities:
            return runs(self.kinds)
        if self.arguments.get("input_ids") is None and not self.kinds.any():
            raise ValueError(f"{SPANS}: expected with inputs_embeds, {HOW}; got none")
        return place(self.kinds, {kind: self._pieces(kind) for kind in modalities})

    def _pieces(self, kind: int) -> Iterable[Piece]:
        name, _ = MODALITIES[kind]
        encoded = (self.arguments.get("mm_encoder_outputs") or {}).get(name)
        if encoded is None:
            return pieces_of(self.family, self.base, kind, self.arguments)
        pieces = getattr(encoded, "adsc_pieces", None)
        if pieces is None:
            raise UnsupportedError(
                f"mm_encoder_outputs: expected what get_{name}_features of the patched model "
                "returned, got another. (Prefill in chunks cuts pictures apart: prefill_chunk_size "
                f"is not supported; or pass {SPANS}.)"
            )
        return pieces


def pieces_of(family: Family, base: Any, kind: int, arguments: dict[str, Any]) -> Iterable[Piece]:
    """What the pictures of one modality are made of."""
    pictures = family.images if kind == 1 else family.videos
    if pictures is None:
        name, pixels = MODALITIES[kind]
        raise UnsupportedError(f"{pixels}: expected no {name}s with {family.model_type}, got some")
    return pictures(base, arguments)


def _follow(layout: BatchLayout, arguments: dict[str, Any]) -> None:
    """What the model makes of its logits is of the rows that are left of them."""
    _check_kept(layout, arguments.get("logits_to_keep"))
    if arguments.get("shift_labels") is not None:
        raise UnsupportedError("shift_labels: expected labels, got labels that are shifted")
    if arguments.get("labels") is not None:
        arguments["labels"] = _labels(layout, arguments["labels"])


def _labels(layout: BatchLayout, labels: Tensor) -> Tensor:
    """Labels [B, S] of the rows of the last stage; -100 for padding, and for a token behind it,
    which nothing predicts."""
    if labels.shape != (layout.batch, layout.width):
        raise ValueError(
            f"labels: expected shape {(layout.batch, layout.width)}, got {tuple(labels.shape)}"
        )
    columns = torch.from_numpy(layout.stages[-1].columns).to(labels.device, non_blocking=True)
    padding = columns < 0
    padding[:, 1:] |= columns[:, :-1] < 0
    return labels.gather(1, columns.clamp(min=0)).masked_fill(padding, -100)


def _check_kept(layout: BatchLayout, last: Any) -> None:
    """The last tokens, whose logits alone are asked for, are in every stage."""
    if isinstance(last, Tensor):
        raise UnsupportedError("logits_to_keep: expected an int, got a tensor")
    if not last or not layout.align_right:
        return
    wanted = layout.stages[0].columns[:, -last:]
    if not np.array_equal(layout.stages[-1].columns[:, -last:], wanted):
        raise ValueError(f"logits_to_keep: expected text in the last {last} tokens, got a picture")
