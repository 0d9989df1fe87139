// The compaction of a KV cache, its arguments checked; for compact_kv_, compact_paged_kv_ and
// compress_step.
#pragma once

#include <vector>

#include "cuda/compact.h"
#include "ops/caches.h"
#include "ops/check.h"

namespace adsc::ops {

// Those of a dense and of a paged cache alike.
struct CompactionArguments {
  const Caches& caches;
  const OptionalTensor& segments;
  const OptionalTensor& keep_indices;
  const Tensor& cu_kept;
  const OptionalTensor& cu_rows;
  const OptionalTensor& prefix_lens;
  const OptionalTensor& seq_lens;
};

struct PageArguments {
  const Tensor& block_table;
  int64_t block_size;
  bool edit_table;
  const OptionalTensor& read_only_blocks;
};

struct CompactionCall {
  Compaction compaction;
  BlockList read_only_blocks;
  std::vector<CacheTensor> tensors;
  CompactionOutputs outputs;
  // seq_lens, slots; of a paged cache also last_page_len, indptr, table
  std::vector<Tensor> results;

  // For the launcher; it refers to this.
  cuda::CacheMoves moves() const;
};

CompactionCall dense_compaction(const CompactionArguments& arguments,
                                const OptionalTensor& seq_starts);
CompactionCall paged_compaction(const CompactionArguments& arguments, const PageArguments& pages);

// On the device of the caches.
void run(const CompactionCall& call, const Tensor& cache);

void run_on_cpu(const CompactionCall& call);

#if defined(ADSC_WITH_CUDA)
// With ADSC_CHECK=1, or where blocks are read-only: they are never written.
void check_on_cuda(const CompactionCall& call, cuda::Stream stream);
#endif

}  // namespace adsc::ops
