"""A decoder of which a method drops what it chooses: the thin LLaVA's layers, rows by index.

What stays is not known before the layers run, so each boundary reads the method's choice back to
the host: the cost that a schedule of ADSC doesn't have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from adsc_kernels import ops
from adsc_kernels.cache import StagePass
from adsc_kernels.llava import Llava
from adsc_kernels.llava.model import Layer
from adsc_kernels.plan import StagePlan
from adsc_kernels.pointwise import Rope, rotate


@dataclass(frozen=True)
class Rows:
    """Packed rows, as attention asks for them; spans and prompt ends count within a sequence.

    Attributes:
        positions: int64 [T].
        seq_lens: rows of each sequence.
        spans: (begin, end) of each sequence's vision rows.
        prompt_lens: rows of each sequence before its answer.
    """

    positions: Tensor
    seq_lens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    prompt_lens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.seq_lens)

    @property
    def max_seqlen(self) -> int:
        return max(self.seq_lens)

    @property
    def firsts(self) -> list[int]:
        """Where each sequence begins, and the total."""
        return [0, *accumulate(self.seq_lens)]

    @cached_property  # an upload, which every layer asks for
    def cu_seqlens(self) -> Tensor:
        return torch.tensor(self.firsts, dtype=torch.int32, device=self.positions.device)

    def keep(self, kept: Sequence[Tensor]) -> tuple[Tensor, Rows]:
        """Index of the rows that stay, and the rows then. kept: of each span, rising, from 0."""
        device, index, spans, lens = self.positions.device, [], [], []
        for first, n, (begin, end), some in zip(
            self.firsts, self.seq_lens, self.spans, kept, strict=False
        ):
            head = torch.arange(first, first + begin, device=device)
            tail = torch.arange(first + end, first + n, device=device)
            index += [head, first + begin + some.to(device), tail]
            spans.append((begin, begin + len(some)))
            lens.append(n - (end - begin) + len(some))
        rows = torch.cat(index)
        dropped = [old - new for old, new in zip(self.seq_lens, lens, strict=True)]
        prompts = tuple(p - d for p, d in zip(self.prompt_lens, dropped, strict=True))
        positions = ops.downsample(self.positions, keep_indices=rows)
        return rows, Rows(positions, tuple(lens), tuple(spans), prompts)


@dataclass(frozen=True)
class View:
    """A layer and what comes into its attention: what scores are made of."""

    layer: Layer
    normed: Tensor
    rope: Rope
    rows: Rows

    def attention(self, b: int, queries: Sequence[int] | Tensor) -> Tensor:
        """Shares of attention in sequence b, [heads, queries, rows of b], float32 and causal."""
        first, n = self.rows.firsts[b], self.rows.seq_lens[b]
        at, device = slice(first, first + n), self.normed.device
        asked = torch.as_tensor(queries, device=device)
        attn = self.layer.self_attn
        qkv = attn.qkv_proj(self.normed[at]).unflatten(-1, (-1, attn.head_dim))
        rope = Rope(*(table[at] for table in self.rope))
        q, k, _ = rotate(qkv, rope, attn.num_kv_heads, None)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", q[asked], k).float() * attn.head_dim**-0.5
        future = torch.arange(n, device=device) > asked[:, None]
        return scores.masked_fill(future, float("-inf")).softmax(-1)


# Of a layer's number, the layer before it (None at 0) and itself, with rows as they come in: which
# vision rows of each sequence stay from this layer on; None for all.
Select = Callable[[int, View | None, View], "Sequence[Tensor] | None"]


def run(model: Llava, x: Tensor, rows: Rows, select: Select | None = None) -> tuple[Tensor, Rows]:
    """Rows [T, hidden] through all layers, to those that are left, before the final norm."""
    before: View | None = None
    rope = model.language_model.rope(rows.positions, x.dtype)
    for n, module in enumerate(model.language_model.layers):
        layer = cast(Layer, module)
        normed = layer.input_layernorm.alone(x)
        here = View(layer, normed, rope, rows)
        kept = None if select is None else select(n, before, here)
        if kept is not None:
            index, rows = rows.keep(kept)
            normed, x = ops.downsample_many([normed, x], keep_indices=index)
            rope = model.language_model.rope(rows.positions, x.dtype)
            here = View(layer, normed, rope, rows)
        # Attention reads of a stage what Rows has.
        stage = cast(StagePlan, rows)
        chunk = StagePass(range(n, n + 1), stage, stage, rows.positions)
        x = x + layer.self_attn.o_proj(layer.self_attn(normed, rope, chunk))
        x = x + layer.mlp(layer.post_attention_layernorm.alone(x))
        before = here
    return x, rows
