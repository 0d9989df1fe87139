"""SparseVLM: after three layers, by how much words that regard the picture look at each patch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from adsc_kernels.baselines.batch import Batch
from adsc_kernels.baselines.decoder import Rows, Select, View
from adsc_kernels.baselines.method import InDecoder, stages, strongest, whole_layers_first
from adsc_kernels.llava import LlavaConfig

# Of 576 tokens, behind layers 2, 6 and 15 of 32, by the averages that the authors name.
TABLE = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}


class SparseVLM(InDecoder):
    """Raters are the prompt's words whose mean share of softmax(vision text^T), over the embeddings
    that come in, is at least the average. What stays is what they look at most, mean over heads
    and raters, in the layer that has run.

    The nearest row of the authors' table is scaled so that what layers *process* meets the budget;
    theirs counts what is left behind each drop. Where the layers in front take too much of the
    budget, boundaries move to half their depth. Dropped tokens are not clustered and put back
    ("recycling"), and positions stay, as in the authors' second version.
    """

    def __init__(self, config: LlavaConfig, budget: int) -> None:
        depth, size = config.num_layers, config.tokens_per_image
        self.layers = _rising(depth * n // 32 for n in (4, 8, 16))
        if self.layers[0] * size * 2 > budget * depth:
            self.layers = _rising(n // 2 for n in self.layers)
        whole_layers_first("sparse_vlm", config, budget, self.layers[0])
        row = TABLE[min(TABLE, key=lambda name: abs(name - budget))]
        self.counts = [size, 0, 0, 0]
        self.tokens = stages(self.layers, self.counts, depth)
        for scale in range(1, 10_001):
            counts = [size, *(min(size, int(n * size * scale / 576_000)) for n in row)]
            tokens = stages(self.layers, counts, depth)
            if sum(tokens) > budget * depth:
                break
            self.counts, self.tokens = counts, tokens

    def selector(self, x: Tensor, rows: Rows, batch: Batch) -> Select:
        """As `InDecoder.selector`."""
        counts = dict(zip(self.layers, self.counts[1:], strict=True))
        # How far from the prompt's end each rater is: dropping in front of it changes nothing.
        raters = [
            raters_of(x[first : first + prompt], span) - prompt
            for first, prompt, span in zip(rows.firsts, rows.prompt_lens, rows.spans, strict=False)
        ]

        def select(n: int, before: View | None, here: View) -> Sequence[Tensor] | None:
            if n not in counts or before is None:
                return None
            kept = []
            for b, (begin, end) in enumerate(before.rows.spans):
                asking = raters[b] + before.rows.prompt_lens[b]
                shares = before.attention(b, asking).mean((0, 1))[begin:end]
                kept.append(strongest(shares, counts[n]))
            return kept

        return select


def _rising(layers: Iterable[int]) -> list[int]:
    """Each behind the one before, as in a shallow decoder they may not be; none before layer 1."""
    found = [0]
    for layer in layers:
        found.append(max(layer, found[-1] + 1))
    return found[1:]


def raters_of(prompt: Tensor, span: tuple[int, int]) -> Tensor:
    """Which rows behind the picture rate it; prompt: [rows, hidden]."""
    vision, text = prompt[slice(*span)], prompt[span[1] :]
    shares = (vision @ text.T).float().softmax(-1).mean(0)
    return torch.nonzero(shares >= shares.mean())[:, 0] + span[1]
