"""PyramidDrop: at three layers, by how much the prompt's last token would look at each patch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adsc_kernels.baselines.batch import Batch
from adsc_kernels.baselines.decoder import Rows, Select, View
from adsc_kernels.baselines.method import InDecoder, stages, strongest, whole_layers_first
from adsc_kernels.llava import LlavaConfig

LEAST_SHARE = 0.25  # below it boundaries move to the front instead


class PyramidDrop(InDecoder):
    """Before each quarter of the depth but the first, the share `keep` of the patches, by queries
    and keys of that very layer, mean over heads.

    The share is the largest that the budget allows. With boundaries at the quarters no share gets
    below a quarter of the tokens; the authors' settings for such budgets are unanswered, so there
    all three move to the front alike, as little as lets the share be a quarter. Positions stay: in
    the original they are numbered anew.
    """

    def __init__(self, config: LlavaConfig, budget: int) -> None:
        whole_layers_first("pyramid_drop", config, budget, 1)
        for every in range(config.num_layers // 4, 0, -1):
            self.layers = [every, 2 * every, 3 * every]
            fitting = [n / 1000 for n in range(1, 1001) if self._fits(config, budget, n / 1000)]
            if fitting and (fitting[-1] >= LEAST_SHARE or every == 1):
                break
        self.counts = _counts(config.tokens_per_image, fitting[-1])
        self.tokens = stages(self.layers, self.counts, config.num_layers)

    def _fits(self, config: LlavaConfig, budget: int, share: float) -> bool:
        counts = _counts(config.tokens_per_image, share)
        tokens = stages(self.layers, counts, config.num_layers)
        return sum(tokens) <= budget * config.num_layers

    def selector(self, x: Tensor, rows: Rows, batch: Batch) -> Select:
        """As `InDecoder.selector`."""
        counts = dict(zip(self.layers, self.counts[1:], strict=True))

        def select(n: int, before: View | None, here: View) -> Sequence[Tensor] | None:
            if n not in counts:
                return None
            kept = []
            for b, (begin, end) in enumerate(here.rows.spans):
                last = here.rows.prompt_lens[b] - 1
                shares = here.attention(b, [last]).mean(0)[0, begin:end]
                kept.append(strongest(shares, counts[n]))
            return kept

        return select


def _counts(tokens: int, share: float) -> list[int]:
    return [int(tokens * share**power) for power in range(4)]
