// compress_step: a boundary's step and the compaction of a cache that was written before it.
#include "cuda/compress_step.h"

#include <string>
#include <vector>

#include "ops/boundary_call.h"
#include "ops/compaction_call.h"
#include "ops/on_device.h"
#include "ops/registration.h"

namespace adsc::ops {
namespace {

// The arguments of either form of the op, in the order of its schema.
struct StepArguments {
  Tensor hidden;
  OptionalTensor residual;
  OptionalTensor weight;
  double eps;
  std::vector<Tensor> others;
  OptionalTensor segments;
  OptionalTensor keep_indices;
  OptionalTensor cu_seqlens;
  OptionalTensor spans;
  std::vector<int64_t> keep;
  std::string pattern;
  int64_t max_height;
  int64_t num_tokens;
  std::vector<Tensor> caches;
  int64_t num_layers;
  OptionalTensor block_table;
  int64_t block_size;
  OptionalTensor cache_segments;
  OptionalTensor cache_keep_indices;
  Tensor cu_kept;
  OptionalTensor cu_rows;
  OptionalTensor prefix_lens;
  OptionalTensor seq_lens;
  OptionalTensor seq_starts;
  bool edit_table;
  OptionalTensor read_only_blocks;
  std::string cache_layout;
};

BoundaryCall boundary_of(const StepArguments& a) {
  return boundary_call({.hidden = a.hidden,
                        .residual = a.residual,
                        .weight = a.weight,
                        .eps = a.eps,
                        .others = a.others,
                        .segments = a.segments,
                        .keep_indices = a.keep_indices,
                        .cu_seqlens = a.cu_seqlens,
                        .spans = a.spans,
                        .keep = a.keep,
                        .pattern = a.pattern,
                        .max_height = a.max_height,
                        .num_tokens = a.num_tokens});
}

CompactionCall compaction_of(const StepArguments& a) {
  const CompactionArguments cache{.caches = a.caches,
                                  .num_layers = a.num_layers,
                                  .segments = a.cache_segments,
                                  .keep_indices = a.cache_keep_indices,
                                  .cu_kept = a.cu_kept,
                                  .cu_rows = a.cu_rows,
                                  .prefix_lens = a.prefix_lens,
                                  .seq_lens = a.seq_lens,
                                  .cache_layout = a.cache_layout};
  if (a.block_table.has_value()) {
    check(!a.seq_starts.has_value(),
          "block_table, seq_starts: expected at most one of them, got both");
    return paged_compaction(cache, {.block_table = *a.block_table,
                                    .block_size = a.block_size,
                                    .edit_table = a.edit_table,
                                    .read_only_blocks = a.read_only_blocks});
  }
  check(!a.edit_table, "edit_table: expected false without block_table");
  check(!a.read_only_blocks.has_value(), "read_only_blocks: expected none without block_table");
  return dense_compaction(cache, a.seq_starts);
}

// What is read while the caches are written.
void check_apart(const StepArguments& a) {
  std::vector<StridedMemory> read{memory_of(a.hidden)};
  if (a.residual.has_value()) read.push_back(memory_of(*a.residual));
  if (a.weight.has_value()) read.push_back(memory_of(*a.weight));
  for (const Tensor& x : a.others) read.push_back(memory_of(x));
  std::vector<StridedMemory> written;
  written.reserve(a.caches.size());
  for (const Tensor& x : a.caches) written.push_back(mutable_memory_of(x));
  const auto found = find_shared(read, written);
  check(!found.has_value(), "caches[", found.has_value() ? found->second : 0,
        "]: expected a tensor that doesn't share memory with hidden, residual, weight or others");
}

// boundary: its outputs are set. Returns what the compaction does.
std::vector<Tensor> step(const StepArguments& a, const BoundaryCall& boundary) {
  check_devices(a.caches, "caches", a.hidden, "hidden");
  check_apart(a);
  const CompactionCall compaction = compaction_of(a);
  run_on_device_of(
      a.hidden,
      [&] {
        run_on_cpu(boundary);  // first: it may still find fault with a layout
        run_on_cpu(compaction);
      },
      [&](auto stream) {
        if (device_checks()) check_on_cuda(boundary, stream);
        check_on_cuda(compaction, stream);
        cuda::compress_step(boundary.moves(), compaction.moves(), stream);
      });
  return compaction.results;
}

// ---- The two forms, unboxed by hand: so the arguments are written once ----

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr uint64_t kArguments = 27;

StepArguments arguments_of(StableIValue* stack) {
  const auto tensor = [&](size_t i) { return to<OptionalTensor>(stack[i]); };
  return {.hidden = to<Tensor>(stack[0]),
          .residual = tensor(1),
          .weight = tensor(2),
          .eps = to<double>(stack[3]),
          .others = to<std::vector<Tensor>>(stack[4]),
          .segments = tensor(5),
          .keep_indices = tensor(6),
          .cu_seqlens = tensor(7),
          .spans = tensor(8),
          .keep = to<std::vector<int64_t>>(stack[9]),
          .pattern = to<std::string>(stack[10]),
          .max_height = to<int64_t>(stack[11]),
          .num_tokens = to<int64_t>(stack[12]),
          .caches = to<std::vector<Tensor>>(stack[13]),
          .num_layers = to<int64_t>(stack[14]),
          .block_table = tensor(15),
          .block_size = to<int64_t>(stack[16]),
          .cache_segments = tensor(17),
          .cache_keep_indices = tensor(18),
          .cu_kept = to<Tensor>(stack[19]),
          .cu_rows = tensor(20),
          .prefix_lens = tensor(21),
          .seq_lens = tensor(22),
          .seq_starts = tensor(23),
          .edit_table = to<bool>(stack[24]),
          .read_only_blocks = tensor(25),
          .cache_layout = to<std::string>(stack[26])};
}

// Into outs, which functionalization needs: it knows no op that writes and returns a list.
void compress_step(StableIValue* stack, uint64_t, uint64_t num_results) {
  const StepArguments a = arguments_of(stack);
  const auto outs = to<std::vector<Tensor>>(stack[kArguments]);
  BoundaryCall boundary = boundary_of(a);
  check_outputs(outs, boundary.outputs, "outs");
  boundary.set_outputs(outs);
  std::vector<Tensor> results = step(a, boundary);
  while (results.size() < num_results) {
    results.push_back(empty(a.hidden, {0}, aoti_torch_dtype_int32()));
  }
  for (size_t i = 0; i < num_results; ++i) stack[i] = from(results[i]);
}

// Into new tensors: a call from Python without them takes the half of the time.
void compress_step_new(StableIValue* stack, uint64_t, uint64_t) {
  const StepArguments a = arguments_of(stack);
  BoundaryCall boundary = boundary_of(a);
  const std::vector<Tensor> outs = allocate(boundary.outputs);
  boundary.set_outputs(outs);
  stack[1] = from(step(a, boundary));
  stack[0] = from(outs);
}

#define ADSC_STEP                                                                                \
  "Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] others, "                \
  "Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, Tensor? spans, int[] keep, "      \
  "str pattern, SymInt max_height, SymInt num_tokens, Tensor(a!)[] caches, int num_layers, "     \
  "Tensor? block_table, SymInt block_size, Tensor? cache_segments, Tensor? cache_keep_indices, " \
  "Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, Tensor? seq_lens, Tensor? seq_starts, " \
  "bool edit_table, Tensor? read_only_blocks, str cache_layout"

ADSC_BOXED_OP("compress_step", compress_step,
              "(" ADSC_STEP ", Tensor(b!)[] outs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
// outs, and what a compaction returns
ADSC_BOXED_OP("compress_step.new", compress_step_new, "(" ADSC_STEP ") -> (Tensor[], Tensor[])")

}  // namespace
}  // namespace adsc::ops
