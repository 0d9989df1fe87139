// compress_step: a boundary's step and the compaction of a cache that was written before it.
#include "cuda/compress_step.h"

#include <string>
#include <tuple>
#include <vector>

#include "ops/boundary_call.h"
#include "ops/compaction_call.h"
#include "ops/on_device.h"
#include "ops/registration.h"

namespace adsc::ops {
namespace {

// What compress_step takes of a cache besides the arguments of a compaction.
struct CacheArguments {
  const OptionalTensor& block_table;
  int64_t block_size;
  const OptionalTensor& seq_starts;
  bool edit_table;
  const OptionalTensor& read_only_blocks;
};

CompactionCall cache_compaction(const CompactionArguments& a, const CacheArguments& cache) {
  if (cache.block_table.has_value()) {
    check(!cache.seq_starts.has_value(),
          "block_table, seq_starts: expected at most one of them, got both");
    return paged_compaction(a, {.block_table = *cache.block_table,
                                .block_size = cache.block_size,
                                .edit_table = cache.edit_table,
                                .read_only_blocks = cache.read_only_blocks});
  }
  check(!cache.edit_table, "edit_table: expected false without block_table");
  check(!cache.read_only_blocks.has_value(), "read_only_blocks: expected none without block_table");
  return dense_compaction(a, cache.seq_starts);
}

// What is read while the caches are written.
void check_apart(const std::vector<Tensor>& others, const Tensor& hidden,
                 const OptionalTensor& residual, const OptionalTensor& weight,
                 const std::vector<Tensor>& caches) {
  std::vector<StridedMemory> read{memory_of(hidden)};
  if (residual.has_value()) read.push_back(memory_of(*residual));
  if (weight.has_value()) read.push_back(memory_of(*weight));
  for (const Tensor& x : others) read.push_back(memory_of(x));
  std::vector<StridedMemory> written;
  for (const Tensor& x : caches) written.push_back(mutable_memory_of(x));
  const auto found = find_shared(read, written);
  check(!found.has_value(), "caches[", found.has_value() ? found->second : 0,
        "]: expected a tensor that doesn't share memory with hidden, residual, weight or others");
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results results_of(const CompactionCall& call, const Tensor& like) {
  const std::vector<Tensor>& results = call.results;
  if (results.size() == 5) return {results[0], results[1], results[2], results[3], results[4]};
  const auto none = [&] { return empty(like, {0}, aoti_torch_dtype_int32()); };
  return {results[0], results[1], none(), none(), none()};
}

// Long by its arguments, each written once.
Results compress_step(Tensor hidden, OptionalTensor residual, OptionalTensor weight, double eps,
                      std::vector<Tensor> others, OptionalTensor segments,
                      OptionalTensor keep_indices, OptionalTensor cu_seqlens, OptionalTensor spans,
                      std::vector<int64_t> keep, std::string pattern, int64_t max_height,
                      int64_t num_tokens, std::vector<Tensor> caches, int64_t num_layers,
                      OptionalTensor block_table, int64_t block_size, OptionalTensor cache_segments,
                      OptionalTensor cache_keep_indices, Tensor cu_kept, OptionalTensor cu_rows,
                      OptionalTensor prefix_lens, OptionalTensor seq_lens,
                      OptionalTensor seq_starts, bool edit_table, OptionalTensor read_only_blocks,
                      std::string cache_layout, std::vector<Tensor> outs) {
  BoundaryCall boundary = boundary_call({.hidden = hidden,
                                         .residual = residual,
                                         .weight = weight,
                                         .eps = eps,
                                         .others = others,
                                         .segments = segments,
                                         .keep_indices = keep_indices,
                                         .cu_seqlens = cu_seqlens,
                                         .spans = spans,
                                         .keep = keep,
                                         .pattern = pattern,
                                         .max_height = max_height,
                                         .num_tokens = num_tokens});
  check_outputs(outs, boundary.outputs, "outs");
  boundary.set_outputs(outs);
  for (const Tensor& cache : caches) check_device(cache, "caches", hidden, "hidden");
  check_apart(others, hidden, residual, weight, caches);
  const CompactionCall compaction = cache_compaction({.caches = caches,
                                                      .num_layers = num_layers,
                                                      .segments = cache_segments,
                                                      .keep_indices = cache_keep_indices,
                                                      .cu_kept = cu_kept,
                                                      .cu_rows = cu_rows,
                                                      .prefix_lens = prefix_lens,
                                                      .seq_lens = seq_lens,
                                                      .cache_layout = cache_layout},
                                                     {.block_table = block_table,
                                                      .block_size = block_size,
                                                      .seq_starts = seq_starts,
                                                      .edit_table = edit_table,
                                                      .read_only_blocks = read_only_blocks});
  run_on_device_of(
      hidden,
      [&] {
        run_on_cpu(boundary);  // first: it may still find fault with a layout
        run_on_cpu(compaction);
      },
      [&](auto stream) {
        if (device_checks()) check_on_cuda(boundary, stream);
        check_on_cuda(compaction, stream);
        cuda::compress_step(boundary.moves(), compaction.moves(), stream);
      });
  return results_of(compaction, hidden);
}

ADSC_OP(compress_step,
        "(Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] others, "
        "Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, Tensor? spans, int[] keep, "
        "str pattern, SymInt max_height, SymInt num_tokens, Tensor(a!)[] caches, int num_layers, "
        "Tensor? block_table, SymInt block_size, Tensor? cache_segments, "
        "Tensor? cache_keep_indices, Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, "
        "Tensor? seq_lens, Tensor? seq_starts, bool edit_table, Tensor? read_only_blocks, "
        "str cache_layout, Tensor(b!)[] outs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")

}  // namespace
}  // namespace adsc::ops
