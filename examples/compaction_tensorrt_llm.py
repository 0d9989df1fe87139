"""Shrink a TensorRT-LLM block pool. Runs without TensorRT-LLM: it makes the tensors.

The pool is that of its KV-cache manager: a block holds all layers side by side, and
`get_buffers(layer, "HND")` is a view of one layer; `get_block_ids_per_seq` gives the table.
"""

import torch

import adsc_kernels as adsc
from adsc_kernels.integrations.layouts import from_tensorrt_llm

BLOCK, HEADS, DIM, LAYERS, BLOCKS = 32, 4, 64, 4, 64
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

pool = torch.randn(BLOCKS, LAYERS, 2, HEADS * BLOCK * DIM, device=device).to(torch.float8_e4m3fn)
buffers = [pool[:, n].view(BLOCKS, 2, HEADS, BLOCK, DIM) for n in range(LAYERS)]

# Two requests that share the block of their system prompt, which must not be written.
schedule = adsc.CompressionSchedule.parse("8:1/4", num_layers=32)
stage = adsc.make_plan(schedule, [0, 700, 1340], [(0, 40, 576), (1, 32, 576)], device).stages[1]
seq_lens = [700, 640]
free = (torch.randperm(BLOCKS - 1) + 1).int()
block_ids = torch.zeros(2, 24, dtype=torch.int32)  # padded with zeros
block_ids[0, :22] = free[:22]
block_ids[1, 0] = free[0]
block_ids[1, 1:20] = free[22:41]
shared = pool[int(free[0])].clone()

cache = from_tensorrt_llm(buffers, block_ids.to(device), tokens_per_block=BLOCK)
after = adsc.ops.compact_paged_kv_(
    cache,
    stage=stage,
    seq_lens=seq_lens,
    block_table_host=block_ids,
    read_only_blocks=[int(free[0])],
)
assert after.free_blocks is not None
assert pool[int(free[0])].view(torch.uint8).equal(shared.view(torch.uint8))
print(f"rows: {seq_lens} -> {list(after.seq_lens.host)}, fp8, {LAYERS} layers in one call")
print(f"blocks free now: {len(after.free_blocks)} of 41, the shared one not among them")
assert len(after.free_blocks) == 41 - 9 - 7 + 1
