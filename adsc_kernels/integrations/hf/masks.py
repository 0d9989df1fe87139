"""A stage's attention masks, made by transformers itself for the stage's lengths.

So eager, sdpa, flash and flex attention, sliding windows and static caches each get what they
expect; only the sizes, the padding and who is in which block differ from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf.compat import fitting, known_parameters


@dataclass
class MaskRequest:
    """What a mask is made of, for one stage.

    Attributes:
        config: of the decoder.
        rows: [B, S, 0], which says how many rows there are, of what dtype and where.
        real: bool [B, cached + S], or None where nothing is padding.
        cache: of the stage's layers, before this pass has written to it.
        sequence_ids: [B, S] positions that start anew where a packed sequence does, or None.
        block_ids: [B, cached + S], tokens that see each other both ways share a number; -1 for
            those that don't. None where the family has none.
    """

    config: Any
    rows: Tensor
    real: Tensor | None
    cache: Cache | None
    sequence_ids: Tensor | None = None
    block_ids: Tensor | None = None


MaskMaker = Callable[[MaskRequest], Any]  # to a mask, or a dict of them by layer type


def causal_masks(request: MaskRequest) -> Any:
    """The usual ones: what the decoder's own forward would make."""
    block_ids, names = request.block_ids, known_parameters(create_masks_for_generate)
    if block_ids is not None and "block_sequence_ids" not in names:
        raise UnsupportedError(
            f"{request.config.model_type}: expected a transformers whose create_masks_for_generate "
            f"takes block_sequence_ids, got {transformers.__version__}"
        )
    past = 0 if request.cache is None else request.cache.get_seq_length()
    rows = request.rows
    arguments = fitting(
        create_masks_for_generate,
        config=request.config,
        inputs_embeds=rows,
        attention_mask=request.real,
        cache=request.cache,
        position_ids=request.sequence_ids,
        block_sequence_ids=block_ids,
        cache_position=torch.arange(rows.shape[1], device=rows.device) + past,
    )
    return create_masks_for_generate(**arguments)


def of_layer(masks: Any, config: Any, layer: int) -> Any:
    """That of one layer."""
    return masks[config.layer_types[layer]] if isinstance(masks, dict) else masks
