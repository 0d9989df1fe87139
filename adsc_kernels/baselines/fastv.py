"""FastV: once, by how much the prompt's last token looks at each patch in the layer before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adsc_kernels.baselines.batch import Batch
from adsc_kernels.baselines.decoder import Rows, Select, View
from adsc_kernels.baselines.method import InDecoder, stages, strongest, whole_layers_first
from adsc_kernels.llava import LlavaConfig


class FastV(InDecoder):
    """Before layer K, the patches that get most of the last token's attention in layer K - 1, mean
    over heads; positions as they were. K is 1 of 16 layers, as 2 of 32 in the paper.
    """

    def __init__(self, config: LlavaConfig, budget: int) -> None:
        self.layer = max(config.num_layers // 16, 1)
        left = whole_layers_first("fastv", config, budget, self.layer)
        self.kept = left // (config.num_layers - self.layer)
        counts = (config.tokens_per_image, self.kept)
        self.tokens = stages([self.layer], counts, config.num_layers)

    def selector(self, x: Tensor, rows: Rows, batch: Batch) -> Select:
        """As `InDecoder.selector`."""

        def select(n: int, before: View | None, here: View) -> Sequence[Tensor] | None:
            if n != self.layer or before is None:
                return None
            kept = []
            for b, (begin, end) in enumerate(before.rows.spans):
                last = before.rows.prompt_lens[b] - 1
                shares = before.attention(b, [last]).mean(0)[0, begin:end]
                kept.append(strongest(shares, self.kept))
            return kept

        return select
