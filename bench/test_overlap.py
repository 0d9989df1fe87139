"""Host time of the check that a cache's tensors share no memory, by layers and by how they lie.

K and V of each layer in tensors of their own, or all layers inside of a page, as TensorRT-LLM's
pools and vLLM's named layouts have them: by pages of layers, or by tokens.

    pytest bench/test_overlap.py --benchmark-enable
"""

from typing import Any

import pytest
import torch

from adsc_kernels.kv.overlap import check_overlap

BLOCKS, TOKENS, ROW = 4, 16, 8


@pytest.mark.parametrize("layers", [32, 126])
@pytest.mark.parametrize("lie", ["alone", "in pages", "in tokens"])
def test_check_overlap(benchmark: Any, lie: str, layers: int) -> None:
    count = 2 * layers
    if lie == "alone":
        tensors = [torch.zeros(BLOCKS, TOKENS, ROW) for _ in range(count)]
    elif lie == "in pages":
        tensors = list(torch.zeros(BLOCKS, count, TOKENS, ROW).unbind(1))
    else:
        tensors = list(torch.zeros(BLOCKS, TOKENS, count, ROW).unbind(2))
    names = [f"k[{i}]" for i in range(count)]
    benchmark(check_overlap, tensors, names)
