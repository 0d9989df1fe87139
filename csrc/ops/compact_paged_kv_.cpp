// compact_paged_kv_: a cache in blocks, found through a table.
#include <string>
#include <tuple>
#include <vector>

#include "ops/compaction_call.h"
#include "ops/registration.h"

namespace adsc::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact_paged_kv_(
    const std::vector<Tensor>& caches, int64_t num_layers, const Tensor& block_table,
    int64_t block_size, const OptionalTensor& segments, const OptionalTensor& keep_indices,
    const Tensor& cu_kept, const OptionalTensor& cu_rows, const OptionalTensor& prefix_lens,
    const OptionalTensor& seq_lens, bool edit_table, const OptionalTensor& read_only_blocks,
    const std::string& cache_layout) {
  const CompactionCall call = paged_compaction({.caches = caches,
                                                .num_layers = num_layers,
                                                .segments = segments,
                                                .keep_indices = keep_indices,
                                                .cu_kept = cu_kept,
                                                .cu_rows = cu_rows,
                                                .prefix_lens = prefix_lens,
                                                .seq_lens = seq_lens,
                                                .cache_layout = cache_layout},
                                               {.block_table = block_table,
                                                .block_size = block_size,
                                                .edit_table = edit_table,
                                                .read_only_blocks = read_only_blocks});
  run(call, caches[0]);
  const std::vector<Tensor>& results = call.results;
  return {results[0], results[1], results[2], results[3], results[4]};
}

ADSC_OP(compact_paged_kv_,
        "(Tensor(a!)[] caches, int num_layers, Tensor block_table, SymInt block_size, "
        "Tensor? segments, Tensor? keep_indices, Tensor cu_kept, Tensor? cu_rows, "
        "Tensor? prefix_lens, Tensor? seq_lens, bool edit_table, Tensor? read_only_blocks, "
        "str cache_layout) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")

}  // namespace
}  // namespace adsc::ops
