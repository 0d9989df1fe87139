"""Shrink the early layers of a vLLM cache after prefill. Runs without vLLM: it makes the tensors.

In an engine they are there already: `kv_caches` are the model runner's tensors of one KV-cache
group, `table` is its block table's device tensor, and `table_host` the NumPy copy that it keeps.
"""

import torch

import adsc_kernels as adsc
from adsc_kernels.integrations.layouts import from_vllm

BLOCK, HEADS, DIM = 16, 8, 128
device = "cuda" if torch.cuda.is_available() else "cpu"

# Two prompts of one 576-token picture and some text; layers 0 to 7 hold all of it.
schedule = adsc.CompressionSchedule.parse("8:1/4,16:1/4,24:1/4", num_layers=32)
layers = schedule.layers_of_stage(0)
plan = adsc.make_plan(
    schedule,
    cu_seqlens=[0, 677, 1318],
    vision_spans=[(0, 35, 576), (1, 20, 576)],
    device=device,
    block_size=BLOCK,
    align="block",
)
stage = plan.between(0, 1)
seq_lens = [677 + 12, 641 + 3]  # some tokens have been generated since

# As vLLM allocates: [layers, blocks, tokens, heads, K and V] in memory, heads first to look at.
pool = torch.randn(len(layers), 120, BLOCK, HEADS, 2 * DIM, device=device, dtype=torch.bfloat16)
kv_caches = list(pool.transpose(2, 3).unbind(0))
table_host = torch.zeros(2, 64, dtype=torch.int32)
blocks = [-(-n // BLOCK) for n in seq_lens]
order = torch.randperm(119)[: sum(blocks)].int() + 1
for b, own in enumerate(order.split(blocks)):
    table_host[b, : len(own)] = own
table = table_host.to(device)

cache = from_vllm(
    kv_caches, table, block_size=BLOCK, num_kv_heads=HEADS, head_dim=DIM, packing="content"
)
after = adsc.ops.compact_paged_kv_(
    cache,
    stage=stage,
    seq_lens=seq_lens,
    block_table_host=table_host,
    edit_table=True,  # the pictures gave whole blocks: what follows stays, and the table says where
)
assert after.free_blocks is not None
print(f"rows of each request: {seq_lens} -> {list(after.seq_lens.host)}")
print(f"blocks: {sum(blocks)} -> {sum(blocks) - len(after.free_blocks)}, to be freed at once:")
print(f"  {after.free_blocks.tolist()}")
print(f"slots of the next tokens: {after.slot_mapping.tolist()}")
for span, s, wanted, kept in plan.rounded:
    print(f"rounded for the blocks' sake: stage {s} keeps {kept} rows of {span}, not {wanted}")
assert len(after.free_blocks) == 2 * (576 - 144) // BLOCK
