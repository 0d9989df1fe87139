// compact_kv_: a dense cache, packed or batched.
#include <tuple>
#include <vector>

#include "ops/compaction_call.h"
#include "ops/registration.h"
#include "ops/string_argument.h"

namespace adsc::ops {
namespace {

using Results = std::tuple<Tensor, Tensor>;

Results compact(const Caches& caches, const OptionalTensor& segments,
                const OptionalTensor& keep_indices, const Tensor& cu_kept,
                const OptionalTensor& cu_rows, const OptionalTensor& prefix_lens,
                const OptionalTensor& seq_lens, const OptionalTensor& seq_starts) {
  const CompactionCall call = dense_compaction({.caches = caches,
                                                .segments = segments,
                                                .keep_indices = keep_indices,
                                                .cu_kept = cu_kept,
                                                .cu_rows = cu_rows,
                                                .prefix_lens = prefix_lens,
                                                .seq_lens = seq_lens},
                                               seq_starts);
  run(call, caches.first());
  return {call.results[0], call.results[1]};
}

Results compact_kv_(const std::vector<Tensor>& caches, int64_t num_layers,
                    const OptionalTensor& segments, const OptionalTensor& keep_indices,
                    const Tensor& cu_kept, const OptionalTensor& cu_rows,
                    const OptionalTensor& prefix_lens, const OptionalTensor& seq_lens,
                    const OptionalTensor& seq_starts, const StringArgument& cache_layout) {
  return compact(caches_of(caches, num_layers, cache_layout), segments, keep_indices, cu_kept,
                 cu_rows, prefix_lens, seq_lens, seq_starts);
}

Results compact_kept(int64_t caches, const OptionalTensor& segments,
                     const OptionalTensor& keep_indices, const Tensor& cu_kept,
                     const OptionalTensor& cu_rows, const OptionalTensor& prefix_lens,
                     const OptionalTensor& seq_lens, const OptionalTensor& seq_starts) {
  return compact(*kept_caches(caches), segments, keep_indices, cu_kept, cu_rows, prefix_lens,
                 seq_lens, seq_starts);
}

#define ADSC_ROWS                                                                                  \
  "Tensor? segments, Tensor? keep_indices, Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, " \
  "Tensor? seq_lens, Tensor? seq_starts"

ADSC_OP(compact_kv_, "(Tensor(a!)[] caches, int num_layers, " ADSC_ROWS
                     ", str cache_layout) -> (Tensor, Tensor)")
ADSC_BOXED_OP("compact_kv_.kept", TORCH_BOX(&compact_kept),
              "(int caches, " ADSC_ROWS ") -> (Tensor, Tensor)")

}  // namespace
}  // namespace adsc::ops
