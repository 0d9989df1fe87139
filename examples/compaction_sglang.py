"""Shrink an SGLang token pool without moving a byte. Runs without SGLang: it makes the tensors.

At page size 1 every row has a slot of its own: to drop rows is to leave their slots out of
`req_to_token` and to give them back to the allocator.
"""

import torch

import adsc_kernels as adsc
from adsc_kernels.integrations.layouts import (
    block_table_to_req_to_token_,
    from_sglang,
    req_to_token_to_block_table,
    req_to_token_to_csr,
)

SLOTS, HEADS, DIM, LAYERS = 1500, 4, 64, 4
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# As MHATokenToKVPool and ReqToTokenPool allocate them; slot 0 takes the K and V of padding.
k_buffer = [torch.randn(SLOTS, HEADS, DIM, device=device) for _ in range(LAYERS)]
v_buffer = [torch.randn(SLOTS, HEADS, DIM, device=device) for _ in range(LAYERS)]
req_to_token = torch.zeros(8, 1024, dtype=torch.int32, device=device)
free_slots = torch.randperm(SLOTS - 1, device=device).int() + 1

# Two running requests with a 576-token picture each.
schedule = adsc.CompressionSchedule.parse("8:1/9", num_layers=32)
stage = adsc.make_plan(schedule, [0, 640, 1260], [(0, 30, 576), (1, 5, 576)], device).stages[1]
req_pool_indices, seq_lens = [5, 2], [645, 620]  # the first has generated five tokens
for request, n in zip(req_pool_indices, seq_lens, strict=True):
    req_to_token[request, :n], free_slots = free_slots[:n], free_slots[n:]
slots = req_to_token[req_pool_indices[1], 5:].clone()  # of the second request's picture
before = [x.clone() for x in (*k_buffer, *v_buffer)]

table = req_to_token_to_block_table(req_to_token, req_pool_indices, max_len=max(seq_lens))
cache = from_sglang(k_buffer, v_buffer, table)
after = adsc.ops.compact_paged_kv_(
    cache,
    stage=stage,
    seq_lens=seq_lens,
    block_table_host=table.cpu(),  # engines keep one; here it is fetched
    edit_table=True,
)
assert after.free_blocks is not None
block_table_to_req_to_token_(req_to_token, req_pool_indices, after.block_table)
freed = torch.as_tensor(after.free_blocks, dtype=torch.int32, device=device)
free_slots = torch.cat([free_slots, freed])

assert all(x.equal(y) for x, y in zip((*k_buffer, *v_buffer), before, strict=True))
assert req_to_token[req_pool_indices[1], 5 : 5 + 64].equal(slots[: 9 * 64 : 9])  # every ninth
kv_indices, kv_indptr = req_to_token_to_csr(req_to_token, req_pool_indices, after.seq_lens.host)
print(f"rows: {seq_lens} -> {list(after.seq_lens.host)}; bytes moved: 0")
print(f"slots given back: {len(freed)}; free now: {len(free_slots)} of {SLOTS - 1}")
print(f"FlashInfer's kv_indptr for the next step: {kv_indptr.tolist()}, {len(kv_indices)} indices")
