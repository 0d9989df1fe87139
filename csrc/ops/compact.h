// The arguments of the compaction ops, checked, on any device.
#pragma once

#include <string>
#include <vector>

#include "compaction.h"
#include "cuda/stream.h"
#include "ops/check.h"

namespace adsc::ops {

// What the two ops have in common.
struct CompactionArguments {
  const std::vector<Tensor>& caches;
  int64_t num_layers;
  const OptionalTensor& segments;
  const OptionalTensor& keep_indices;
  const Tensor& cu_kept;
  const OptionalTensor& cu_rows;
  const OptionalTensor& prefix_lens;
  const OptionalTensor& seq_lens;
  const std::string& layout;
};

struct CompactionCall {
  Compaction compaction;
  BlockList pinned;
  std::vector<CacheTensor> tensors;
  CompactionOutputs outputs;
  // seq_lens, slots; of a paged cache also last_page_len, indptr, table
  std::vector<Tensor> results;
};

CompactionCall dense_compaction(const CompactionArguments& arguments,
                                const OptionalTensor& seq_starts);
CompactionCall paged_compaction(const CompactionArguments& arguments, const Tensor& block_table,
                                int64_t block_size, bool edit_table, const OptionalTensor& pinned);

void run_on_cpu(const CompactionCall& call);

#if defined(ADSC_WITH_CUDA)
// With ADSC_CHECK=1, or where blocks are pinned: they are never written.
void check_on_cuda(const CompactionCall& call, cuda::Stream stream);
#endif

}  // namespace adsc::ops
