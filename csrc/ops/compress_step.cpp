// compress_step: a boundary's step and the compaction of a cache that was written before it.
#include "cuda/compress_step.h"

#include <vector>

#include "ops/boundary_call.h"
#include "ops/compaction_call.h"
#include "ops/on_device.h"
#include "ops/registration.h"
#include "ops/string_argument.h"

namespace adsc::ops {
namespace {

// The arguments of either form of the op, in the order of its schema, but the caches.
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
  StringArgument pattern;
  int64_t max_height;
  int64_t num_tokens;
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

CompactionCall compaction_of(const StepArguments& a, const Caches& caches) {
  const CompactionArguments cache{.caches = caches,
                                  .segments = a.cache_segments,
                                  .keep_indices = a.cache_keep_indices,
                                  .cu_kept = a.cu_kept,
                                  .cu_rows = a.cu_rows,
                                  .prefix_lens = a.prefix_lens,
                                  .seq_lens = a.seq_lens};
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
void check_apart(const StepArguments& a, const Caches& caches) {
  std::vector<StridedMemory> read{memory_of(a.hidden)};
  if (a.residual.has_value()) read.push_back(memory_of(*a.residual));
  if (a.weight.has_value()) read.push_back(memory_of(*a.weight));
  for (const Tensor& x : a.others) read.push_back(memory_of(x));
  std::vector<StridedMemory> written;
  written.reserve(caches.places.size());
  for (const CachePlace& place : caches.places) written.push_back(place.memory());
  const auto found = find_shared(read, written);
  check(!found.has_value(), "caches[", found.has_value() ? found->second : 0,
        "]: expected a tensor that doesn't share memory with hidden, residual, weight or others");
}

// boundary: its outputs are set. Returns what the compaction does.
std::vector<Tensor> step(const StepArguments& a, const Caches& caches,
                         const BoundaryCall& boundary) {
  check_device(caches.first(), "caches", a.hidden, "hidden");
  check_apart(a, caches);
  const CompactionCall compaction = compaction_of(a, caches);
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

// Those of the boundary lie first on the stack, and `rest` points behind the caches.
StepArguments arguments_of(const StableIValue* stack, const StableIValue* rest) {
  const auto tensor = [](StableIValue value) { return to<OptionalTensor>(value); };
  return {.hidden = to<Tensor>(stack[0]),
          .residual = tensor(stack[1]),
          .weight = tensor(stack[2]),
          .eps = to<double>(stack[3]),
          .others = to<std::vector<Tensor>>(stack[4]),
          .segments = tensor(stack[5]),
          .keep_indices = tensor(stack[6]),
          .cu_seqlens = tensor(stack[7]),
          .spans = tensor(stack[8]),
          .keep = to<std::vector<int64_t>>(stack[9]),
          .pattern = to<StringArgument>(stack[10]),
          .max_height = to<int64_t>(stack[11]),
          .num_tokens = to<int64_t>(stack[12]),
          .block_table = tensor(rest[0]),
          .block_size = to<int64_t>(rest[1]),
          .cache_segments = tensor(rest[2]),
          .cache_keep_indices = tensor(rest[3]),
          .cu_kept = to<Tensor>(rest[4]),
          .cu_rows = tensor(rest[5]),
          .prefix_lens = tensor(rest[6]),
          .seq_lens = tensor(rest[7]),
          .seq_starts = tensor(rest[8]),
          .edit_table = to<bool>(rest[9]),
          .read_only_blocks = tensor(rest[10])};
}

constexpr size_t kCaches = 13;         // where they begin
constexpr size_t kRest = kCaches + 2;  // behind a list and the number of layers
constexpr size_t kLayout = kRest + 11;

Caches listed(const StableIValue* stack) {
  const auto tensors = to<std::vector<Tensor>>(stack[kCaches]);
  return caches_of(tensors, to<int64_t>(stack[kCaches + 1]), to<StringArgument>(stack[kLayout]));
}

// Into outs, which functionalization needs: it knows no op that writes and returns a list.
void compress_step(StableIValue* stack, uint64_t, uint64_t num_results) {
  const StepArguments a = arguments_of(stack, stack + kRest);
  const auto outs = to<std::vector<Tensor>>(stack[kLayout + 1]);
  const Caches caches = listed(stack);
  BoundaryCall boundary = boundary_of(a);
  check_outputs(outs, boundary.outputs, "outs");
  boundary.set_outputs(outs);
  std::vector<Tensor> results = step(a, caches, boundary);
  while (results.size() < num_results) {
    results.push_back(empty(a.hidden, {0}, aoti_torch_dtype_int32()));
  }
  for (size_t i = 0; i < num_results; ++i) stack[i] = from(results[i]);
}

// Into new tensors, which takes a call from Python much less time.
void step_into_new(const StepArguments& a, const Caches& caches, StableIValue* stack) {
  BoundaryCall boundary = boundary_of(a);
  const std::vector<Tensor> outs = allocate(boundary.outputs);
  boundary.set_outputs(outs);
  stack[1] = from(step(a, caches, boundary));
  stack[0] = from(outs);
}

void compress_step_raw(StableIValue* stack, uint64_t, uint64_t) {
  const StepArguments a = arguments_of(stack, stack + kRest);
  step_into_new(a, listed(stack), stack);
}

void compress_step_kept(StableIValue* stack, uint64_t, uint64_t) {
  const StepArguments a = arguments_of(stack, stack + kCaches + 1);
  step_into_new(a, *kept_caches(to<int64_t>(stack[kCaches])), stack);
}

#define ADSC_BOUNDARY                                                                       \
  "Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] others, "           \
  "Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, Tensor? spans, int[] keep, " \
  "str pattern, SymInt max_height, SymInt num_tokens, "
#define ADSC_ROWS                                                                                  \
  ", Tensor? block_table, SymInt block_size, Tensor? cache_segments, Tensor? cache_keep_indices, " \
  "Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, Tensor? seq_lens, Tensor? seq_starts, "   \
  "bool edit_table, Tensor? read_only_blocks"
#define ADSC_LISTED \
  "(" ADSC_BOUNDARY "Tensor(a!)[] caches, int num_layers" ADSC_ROWS ", str cache_layout"

ADSC_BOXED_OP("compress_step", compress_step,
              ADSC_LISTED ", Tensor(b!)[] outs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
// Both return outs, and what a compaction returns.
ADSC_BOXED_OP("compress_step.raw", compress_step_raw, ADSC_LISTED ") -> (Tensor[], Tensor[])")
ADSC_BOXED_OP("compress_step.kept", compress_step_kept,
              "(" ADSC_BOUNDARY "int caches" ADSC_ROWS ") -> (Tensor[], Tensor[])")

}  // namespace
}  // namespace adsc::ops
