"""Shrink a FlashInfer paged cache and plan the next attention. Runs without FlashInfer.

The attention is plain PyTorch over the pages that kv_indices names, so that it can be compared with
attention over the rows picked out by hand.
"""

import torch

import adsc_kernels as adsc
from adsc_kernels.integrations.layouts import (
    block_table_to_csr,
    csr_to_block_table,
    from_flashinfer,
)

PAGE, HEADS, DIM, LAYERS = 8, 4, 64, 4
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# One 64-token picture in each of two sequences, of which 16 tokens stay.
schedule = adsc.CompressionSchedule.parse("4:1/4", num_layers=32)
stage = adsc.make_plan(schedule, [0, 90, 170], [(0, 10, 64), (1, 4, 64)], device=device).stages[1]
seq_lens = [90, 80]

# What the engine has: kv_cache [pages, 2, page_size, heads, dim] for each layer, and the CSR table.
kv = [torch.randn(40, 2, PAGE, HEADS, DIM, device=device) for _ in range(LAYERS)]
pages = [-(-n // PAGE) for n in seq_lens]
kv_indices = torch.randperm(40, device=device)[: sum(pages)].int()
kv_indptr = [0, pages[0], sum(pages)]  # on the host, where FlashInfer's plan() wants it too


def attend(query, layer, indices, indptr, last_page_len):
    """What a decode wrapper planned with these three computes."""
    outs = []
    for b, q in enumerate(query):
        own = indices[indptr[b] : indptr[b + 1]].long()
        rows = (len(own) - 1) * PAGE + int(last_page_len[b])
        k, v = (kv[layer][own, plane].flatten(0, 1)[:rows] for plane in (0, 1))
        outs.append(torch.einsum("hn,nhd->hd", torch.einsum("hd,nhd->hn", q, k).softmax(-1), v))
    return torch.stack(outs)


query = torch.randn(2, HEADS, DIM, device=device)
keep, expected = stage.keep_indices().split(stage.seq_lens), []
for b, first in enumerate((0, 90)):
    own = kv_indices[kv_indptr[b] : kv_indptr[b + 1]].long()
    k, v = (kv[-1][own, plane].flatten(0, 1)[keep[b] - first] for plane in (0, 1))
    expected.append(
        torch.einsum("hn,nhd->hd", torch.einsum("hd,nhd->hn", query[b], k).softmax(-1), v)
    )

# Once, where the batch is built; then one call for all layers.
table = csr_to_block_table(kv_indices, kv_indptr)
cache = from_flashinfer(kv, table, page_size=PAGE, kv_layout="NHD")
after = adsc.ops.compact_paged_kv_(
    cache,
    stage=stage,
    seq_lens=seq_lens,
    block_table_host=table.cpu(),  # engines keep one; here it is fetched
)
assert after.free_blocks is not None

# The next plan(): counts from the lengths, which the host knows.
kv_indices, kv_indptr_device = block_table_to_csr(
    after.block_table, [-(-n // PAGE) for n in after.seq_lens.host]
)
got = attend(query, -1, kv_indices, kv_indptr_device.tolist(), after.last_page_len)
torch.testing.assert_close(got, torch.stack(expected))
assert kv_indptr_device.equal(after.indptr)
print(f"rows: {seq_lens} -> {list(after.seq_lens.host)}")
print(f"pages: {sum(pages)} -> {len(kv_indices)}; free now: {after.free_blocks.tolist()}")
print(f"kv_last_page_len: {after.last_page_len.tolist()}")
print("attention over the pages equals attention over the rows picked by hand")
