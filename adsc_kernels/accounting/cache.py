"""What a KV cache takes up: bits of an element, scales beside it, blocks."""

from __future__ import annotations

from dataclasses import dataclass

from adsc_kernels.accounting.shapes import ModelShape
from adsc_kernels.checks import at_least, choice

KV_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "fp8": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class CacheFormat:
    """How rows are stored.

    ``scale_bytes`` lie beside each head's row of K and of V (a float32 scale is 4, with a zero
    point 8). With ``block_size`` each sequence takes whole blocks of so many rows in every layer.
    """

    dtype: str = "bfloat16"
    scale_bytes: int = 0
    block_size: int = 1

    def __post_init__(self) -> None:
        choice("kv_dtype", self.dtype, KV_BITS)
        at_least(0, scale_bytes=self.scale_bytes)
        at_least(1, block_size=self.block_size)

    def row_bytes(self, shape: ModelShape) -> int:
        """K and V of one token in one layer; a head's row starts at a whole byte."""
        head = -(-shape.head_dim * KV_BITS[self.dtype] // 8) + self.scale_bytes
        return 2 * shape.num_kv_heads * head

    def layer_bytes(self, shape: ModelShape, lengths: tuple[int, ...]) -> int:
        """One layer's cache of sequences of these lengths."""
        blocks = sum(-(-length // self.block_size) for length in lengths)
        return blocks * self.block_size * self.row_bytes(shape)
