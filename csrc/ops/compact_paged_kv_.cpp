// compact_paged_kv_: a cache in blocks, found through a table.
#include <tuple>
#include <vector>

#include "ops/compaction_call.h"
#include "ops/registration.h"
#include "ops/string_argument.h"

namespace adsc::ops {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results compact(const Caches& caches, const Tensor& block_table, int64_t block_size,
                const OptionalTensor& segments, const OptionalTensor& keep_indices,
                const Tensor& cu_kept, const OptionalTensor& cu_rows,
                const OptionalTensor& prefix_lens, const OptionalTensor& seq_lens, bool edit_table,
                const OptionalTensor& read_only_blocks) {
  const CompactionCall call = paged_compaction({.caches = caches,
                                                .segments = segments,
                                                .keep_indices = keep_indices,
                                                .cu_kept = cu_kept,
                                                .cu_rows = cu_rows,
                                                .prefix_lens = prefix_lens,
                                                .seq_lens = seq_lens},
                                               {.block_table = block_table,
                                                .block_size = block_size,
                                                .edit_table = edit_table,
                                                .read_only_blocks = read_only_blocks});
  run(call, caches.first());
  const std::vector<Tensor>& results = call.results;
  return {results[0], results[1], results[2], results[3], results[4]};
}

Results compact_paged_kv_(const std::vector<Tensor>& caches, int64_t num_layers,
                          const Tensor& block_table, int64_t block_size,
                          const OptionalTensor& segments, const OptionalTensor& keep_indices,
                          const Tensor& cu_kept, const OptionalTensor& cu_rows,
                          const OptionalTensor& prefix_lens, const OptionalTensor& seq_lens,
                          bool edit_table, const OptionalTensor& read_only_blocks,
                          const StringArgument& cache_layout) {
  return compact(caches_of(caches, num_layers, cache_layout), block_table, block_size, segments,
                 keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, edit_table,
                 read_only_blocks);
}

Results compact_kept(int64_t caches, const Tensor& block_table, int64_t block_size,
                     const OptionalTensor& segments, const OptionalTensor& keep_indices,
                     const Tensor& cu_kept, const OptionalTensor& cu_rows,
                     const OptionalTensor& prefix_lens, const OptionalTensor& seq_lens,
                     bool edit_table, const OptionalTensor& read_only_blocks) {
  return compact(*kept_caches(caches), block_table, block_size, segments, keep_indices, cu_kept,
                 cu_rows, prefix_lens, seq_lens, edit_table, read_only_blocks);
}

#define ADSC_PAGES                                                                            \
  "Tensor block_table, SymInt block_size, Tensor? segments, Tensor? keep_indices, "           \
  "Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, Tensor? seq_lens, bool edit_table, " \
  "Tensor? read_only_blocks"
#define ADSC_RESULTS "(Tensor, Tensor, Tensor, Tensor, Tensor)"

ADSC_OP(compact_paged_kv_,
        "(Tensor(a!)[] caches, int num_layers, " ADSC_PAGES ", str cache_layout) -> " ADSC_RESULTS)
ADSC_BOXED_OP("compact_paged_kv_.kept", TORCH_BOX(&compact_kept),
              "(int caches, " ADSC_PAGES ") -> " ADSC_RESULTS)

}  // namespace
}  // namespace adsc::ops
