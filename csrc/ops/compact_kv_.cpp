// compact_kv_: a dense cache, packed or batched.
#include <string>
#include <tuple>
#include <vector>

#include "ops/compaction_call.h"
#include "ops/registration.h"

namespace adsc::ops {
namespace {

std::tuple<Tensor, Tensor> compact_kv_(
    const std::vector<Tensor>& caches, int64_t num_layers, const OptionalTensor& segments,
    const OptionalTensor& keep_indices, const Tensor& cu_kept, const OptionalTensor& cu_rows,
    const OptionalTensor& prefix_lens, const OptionalTensor& seq_lens,
    const OptionalTensor& seq_starts, const std::string& cache_layout) {
  const CompactionCall call = dense_compaction({.caches = caches,
                                                .num_layers = num_layers,
                                                .segments = segments,
                                                .keep_indices = keep_indices,
                                                .cu_kept = cu_kept,
                                                .cu_rows = cu_rows,
                                                .prefix_lens = prefix_lens,
                                                .seq_lens = seq_lens,
                                                .cache_layout = cache_layout},
                                               seq_starts);
  run(call, caches[0]);
  return {call.results[0], call.results[1]};
}

ADSC_OP(compact_kv_,
        "(Tensor(a!)[] caches, int num_layers, Tensor? segments, Tensor? keep_indices, "
        "Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, Tensor? seq_lens, "
        "Tensor? seq_starts, str cache_layout) -> (Tensor, Tensor)")

}  // namespace
}  // namespace adsc::ops
