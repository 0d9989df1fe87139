from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    cxx_flags: str
    torch: str
    cuda_compiler: str | None
    cuda_archs: tuple[str, ...] | None
    cuda_reason: str | None

# Address, bytes of an element, shape and strides of a tensor.
_Placed = tuple[int, int, Sequence[int], Sequence[int]]

def build_info() -> BuildInfo: ...
def plan(
    boundaries: Sequence[Sequence[int]],
    cu_seqlens: Sequence[int],
    vision_spans: Sequence[Sequence[int]],
    chunks: Sequence[Sequence[int]] | None,
    align: int = 1,
) -> tuple[
    NDArray[np.int32], list[tuple[int, int, bool]], NDArray[np.int32], NDArray[np.int64]
]: ...
def expand(segments: NDArray[np.int32], rows: int) -> NDArray[np.int64]: ...
def compress(sources: NDArray[np.int64]) -> NDArray[np.int32]: ...
def check_pages(
    table: NDArray[np.integer],
    prefix_lens: Sequence[int],
    source_lens: Sequence[int],
    kept_lens: Sequence[int],
    seq_lens: Sequence[int],
    sources: NDArray[np.integer] | None,
    block_size: int,
    num_blocks: int,
    edit_table: bool,
    read_only_blocks: NDArray[np.integer],
    table_name: str,
) -> tuple[tuple[NDArray[np.int64], ...], NDArray[np.int64]] | None: ...
def find_overlap(
    tensors: Sequence[_Placed],
) -> tuple[tuple[int, int] | None, int]: ...
def find_shared(read: Sequence[_Placed], written: Sequence[_Placed]) -> tuple[int, int] | None: ...
def kept_count(n: int, numerator: int, denominator: int) -> int: ...
def aligned_kept_count(n: int, kept: int, block: int) -> int: ...
def kept_index(pattern: int, j: int, n: int, m: int) -> int: ...
def kept_before(pattern: int, x: int, n: int, m: int) -> int: ...
