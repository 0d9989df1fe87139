// compress_step: a boundary's step and the compaction of a cache that was written before it.
#include "cuda/compress_step.h"

#include <tuple>

#include "ops/boundary_step.h"
#include "ops/compact.h"
#include "ops/on_device.h"
#include "ops/ops.h"

namespace adsc::ops {
namespace {

struct StepCall {
  BoundaryCall boundary;
  CompactionCall compaction;
};

// All checks of both.
StepCall step_call(const BoundaryArguments& a, const CompactionArguments& c,
                   const OptionalTensor& block_table, int64_t block_size,
                   const OptionalTensor& seq_starts, bool edit_table, const OptionalTensor& pinned,
                   const std::vector<Tensor>& outs) {
  BoundaryCall boundary = boundary_call(a);
  check_outputs(outs, boundary.outputs, "outs");
  boundary.set_outputs(outs);
  for (const Tensor& cache : c.caches) check_device(cache, "caches", a.hidden, "hidden");
  check(!block_table.has_value() || !seq_starts.has_value(),
        "block_table, seq_starts: expected at most one of them, got both");
  check(block_table.has_value() || !edit_table, "edit_table: expected false without block_table");
  check(block_table.has_value() || !pinned.has_value(),
        "pinned: expected none without block_table");
  return {std::move(boundary),
          block_table.has_value()
              ? paged_compaction(c, *block_table, block_size, edit_table, pinned)
              : dense_compaction(c, seq_starts)};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results results_of(const CompactionCall& call, const Tensor& like) {
  const std::vector<Tensor>& results = call.results;
  if (results.size() == 5) return {results[0], results[1], results[2], results[3], results[4]};
  const auto none = [&] { return empty(like, {0}, aoti_torch_dtype_int32()); };
  return {results[0], results[1], none(), none(), none()};
}

}  // namespace

Results compress_step_cpu(Tensor hidden, OptionalTensor residual, OptionalTensor weight, double eps,
                          std::vector<Tensor> others, OptionalTensor segments,
                          OptionalTensor keep_indices, OptionalTensor cu_seqlens,
                          OptionalTensor spans, std::vector<int64_t> keep, std::string pattern,
                          int64_t max_height, int64_t num_tokens, std::vector<Tensor> caches,
                          int64_t num_layers, OptionalTensor block_table, int64_t block_size,
                          OptionalTensor cache_segments, OptionalTensor cache_keep_indices,
                          Tensor cu_kept, OptionalTensor cu_rows, OptionalTensor prefix_lens,
                          OptionalTensor seq_lens, OptionalTensor seq_starts, bool edit_table,
                          OptionalTensor pinned, std::string layout, std::vector<Tensor> outs) {
  const StepCall call = step_call({hidden, residual, weight, eps, others, segments, keep_indices,
                                   cu_seqlens, spans, keep, pattern, max_height, num_tokens},
                                  {caches, num_layers, cache_segments, cache_keep_indices, cu_kept,
                                   cu_rows, prefix_lens, seq_lens, layout},
                                  block_table, block_size, seq_starts, edit_table, pinned, outs);
  run_on_cpu(call.boundary);  // first: it may still find fault with a layout
  run_on_cpu(call.compaction);
  return results_of(call.compaction, hidden);
}

#if defined(ADSC_WITH_CUDA)

Results compress_step_cuda(Tensor hidden, OptionalTensor residual, OptionalTensor weight,
                           double eps, std::vector<Tensor> others, OptionalTensor segments,
                           OptionalTensor keep_indices, OptionalTensor cu_seqlens,
                           OptionalTensor spans, std::vector<int64_t> keep, std::string pattern,
                           int64_t max_height, int64_t num_tokens, std::vector<Tensor> caches,
                           int64_t num_layers, OptionalTensor block_table, int64_t block_size,
                           OptionalTensor cache_segments, OptionalTensor cache_keep_indices,
                           Tensor cu_kept, OptionalTensor cu_rows, OptionalTensor prefix_lens,
                           OptionalTensor seq_lens, OptionalTensor seq_starts, bool edit_table,
                           OptionalTensor pinned, std::string layout, std::vector<Tensor> outs) {
  const StepCall call = step_call({hidden, residual, weight, eps, others, segments, keep_indices,
                                   cu_seqlens, spans, keep, pattern, max_height, num_tokens},
                                  {caches, num_layers, cache_segments, cache_keep_indices, cu_kept,
                                   cu_rows, prefix_lens, seq_lens, layout},
                                  block_table, block_size, seq_starts, edit_table, pinned, outs);
  const BoundaryCall& boundary = call.boundary;
  const CompactionCall& compaction = call.compaction;
  const OnDevice device(hidden);
  if (device_checks()) check_on_cuda(boundary, device.stream());
  check_on_cuda(compaction, device.stream());
  const std::optional<cuda::LayoutStep> layout_given = layout_step(boundary);
  cuda::compress_step(boundary.map, layout_given.has_value() ? &*layout_given : nullptr,
                      boundary.norm.has_value() ? &*boundary.norm : nullptr, boundary.copies.data(),
                      static_cast<int>(boundary.copies.size()), compaction.compaction,
                      compaction.tensors.data(), static_cast<int>(compaction.tensors.size()),
                      compaction.outputs, device.stream());
  return results_of(compaction, hidden);
}

#endif

}  // namespace adsc::ops
