#include "ops/compaction_call.h"

#include <limits>

#include "cpu/compact.h"
#include "ops/on_device.h"
#include "ops/outputs.h"
#include "ops/rows.h"

namespace adsc::ops {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

IntList ints(const Tensor& tensor) {
  return {.data = tensor.const_data_ptr(), .wide = dtype_of(tensor) == aoti_torch_dtype_int64()};
}

IntList int_list(const Tensor& list, const char* name, int64_t count, const Tensor& like) {
  check_device(list, name, like, "caches[0]");
  check(is_int(list) && list.dim() == 1 && list.size(0) == count && list.is_contiguous(), name,
        ": expected contiguous int32 or int64 [", count, "], got shape ", Shape{list});
  return ints(list);
}

IntList int_list(const OptionalTensor& list, const char* name, int64_t count, const Tensor& like) {
  return list.has_value() ? int_list(*list, name, count, like) : IntList{};
}

// How long the parts of each sequence are.
void set_lengths(const CompactionArguments& a, Compaction& c) {
  const Tensor& first = a.caches.first();
  check(a.cu_kept.dim() == 1 && a.cu_kept.size(0) >= 1 && a.cu_kept.size(0) <= kMost,
        "cu_kept: expected shape [B + 1], got ", Shape{a.cu_kept});
  const int64_t batch = a.cu_kept.size(0) - 1;
  c.batch = static_cast<int32_t>(batch);
  c.cu_kept = int_list(a.cu_kept, "cu_kept", batch + 1, first);
  c.cu_rows = int_list(a.cu_rows, "cu_rows", batch + 1, first);
  c.prefix_lens = int_list(a.prefix_lens, "prefix_lens", batch, first);
  c.seq_lens = int_list(a.seq_lens, "seq_lens", batch, first);
  check(a.cu_rows.has_value() || (a.seq_lens.has_value() && a.keep_indices.has_value()),
        "cu_rows: expected it with segments, and in place of seq_lens, got none");
}

// Which rows stay.
void set_rows(const CompactionArguments& a, Compaction& c) {
  const Tensor& first = a.caches.first();
  if (a.segments.has_value()) {
    const SegmentTable table = segment_table(*a.segments, first, "caches[0]");
    c.by_segments = true;
    c.segments = table.segments;
    c.num_segments = table.count;
    return;
  }
  const Tensor& indices = *a.keep_indices;
  check_device(indices, "keep_indices", first, "caches[0]");
  check(is_int(indices) && indices.dim() == 3 && indices.is_contiguous(),
        "keep_indices: expected contiguous int32 or int64 [layers or 1, heads or 1, rows], got "
        "shape ",
        Shape{indices});
  check(indices.size(0) == 1 || indices.size(0) == a.caches.num_layers,
        "keep_indices: expected 1 or ", a.caches.num_layers, " layers, got shape ", Shape{indices});
  check(indices.size(1) >= 1 && indices.size(1) <= kMost,
        "keep_indices: expected at least one head, got shape ", Shape{indices});
  c.indices = ints(indices);
  c.index_layers = static_cast<int32_t>(indices.size(0));
  c.index_heads = static_cast<int32_t>(indices.size(1));
  c.num_indices = indices.size(2);
}

// All but the placement.
CompactionCall compaction_of(const CompactionArguments& a) {
  check(a.segments.has_value() != a.keep_indices.has_value(),
        "segments, keep_indices: expected exactly one of them, got ",
        a.segments.has_value() ? "both" : "neither");
  CompactionCall call;
  Compaction& c = call.compaction;
  set_lengths(a, c);
  set_rows(a, c);
  c.num_blocks = a.caches.num_blocks;
  c.num_tokens = a.caches.num_tokens;
  call.tensors = cache_tensors(a.caches, c.index_heads);
  return call;
}

void check_contents(const CompactionCall& call, const Tensor& like) {
  if (!host_can_read(like)) return;
  const std::string fault = cpu::find_fault(call.compaction, call.read_only_blocks);
  check(fault.empty(), fault);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void add_results(CompactionCall& call, const Tensor& like) {
  const int64_t batch = call.compaction.batch;
  call.results = {empty(like, {batch}, aoti_torch_dtype_int32()),
                  empty(like, {batch}, aoti_torch_dtype_int64())};
  call.outputs.seq_lens = data<int32_t>(call.results[0]);
  call.outputs.slots = data<int64_t>(call.results[1]);
}

void add_page_results(CompactionCall& call, const Tensor& block_table) {
  const Compaction& c = call.compaction;
  const int64_t batch = c.batch;
  const int32_t int32 = aoti_torch_dtype_int32();
  call.results.push_back(empty(block_table, {batch}, int32));
  call.results.push_back(empty(block_table, {batch + 1}, int32));
  call.results.push_back(c.edit_table ? empty(block_table, {batch, c.table_width})
                                      : empty(block_table, {0, 0}));
  call.outputs.last_page_len = data<int32_t>(call.results[2]);
  call.outputs.indptr = data<int32_t>(call.results[3]);
  call.outputs.table = c.edit_table ? call.results[4].mutable_data_ptr() : nullptr;
}

// Blocks of block_size tokens; a pool of slots is cut into them.
void set_blocks(const Tensor& first, int64_t block_size, CompactionCall& call) {
  Compaction& c = call.compaction;
  check(block_size >= 1 && block_size <= kMost, "block_size: expected at least 1, got ",
        block_size);
  if (first.dim() == 4) {
    check(c.num_tokens == block_size, "block_size: expected ", c.num_tokens,
          ", the tokens of a block of caches[0], got ", block_size);
    return;
  }
  check(c.num_tokens % block_size == 0, "block_size: expected a divisor of the ", c.num_tokens,
        " slots, got ", block_size);
  c.num_blocks = c.num_tokens / block_size;
  c.num_tokens = block_size;
  for (CacheTensor& tensor : call.tensors) tensor.block_stride = block_size * tensor.token_stride;
}

void set_table(const Tensor& first, const Tensor& block_table, Compaction& c) {
  check_device(block_table, "block_table", first, "caches[0]");
  check(is_int(block_table) && block_table.dim() == 2 && block_table.size(0) == c.batch &&
            (block_table.numel() == 0 || block_table.size(1) == 1 || block_table.stride(1) == 1),
        "block_table: expected int32 or int64 [", c.batch,
        ", max_blocks] with unit stride within a row, got shape ", Shape{block_table});
  c.table = ints(block_table);
  c.table_stride = block_table.stride(0);
  c.table_width = block_table.size(1);
}

}  // namespace

cuda::CacheMoves CompactionCall::moves() const {
  return {.compaction = compaction, .tensors = tensors, .outputs = outputs};
}

CompactionCall dense_compaction(const CompactionArguments& a, const OptionalTensor& seq_starts) {
  CompactionCall call = compaction_of(a);
  Compaction& c = call.compaction;
  const Tensor& first = a.caches.first();
  if (first.dim() == 3) {
    check(seq_starts.has_value(), "seq_starts: expected it for packed caches, got none");
    c.placement = Placement::kPacked;
    c.seq_starts = int_list(*seq_starts, "seq_starts", c.batch + 1, first);
  } else {
    check(!seq_starts.has_value(), "seq_starts: expected none for batched caches");
    check(c.num_blocks == c.batch, "caches[0]: expected ", c.batch, " sequences, got shape ",
          Shape{first});
    c.placement = Placement::kBatched;
  }
  check_contents(call, first);
  add_results(call, first);
  return call;
}

CompactionCall paged_compaction(const CompactionArguments& a, const PageArguments& pages) {
  CompactionCall call = compaction_of(a);
  Compaction& c = call.compaction;
  const Tensor& first = a.caches.first();
  c.placement = Placement::kPaged;
  c.edit_table = pages.edit_table;
  set_blocks(first, pages.block_size, call);
  check(!c.edit_table || (c.index_layers == 1 && c.index_heads == 1),
        "edit_table: expected the same rows for all layers and heads, got keep_indices of shape ",
        a.keep_indices.has_value() ? join(Shape{*a.keep_indices}) : "");
  set_table(first, pages.block_table, c);
  if (const OptionalTensor& blocks = pages.read_only_blocks; blocks.has_value()) {
    const int64_t count = blocks->dim() == 1 ? blocks->size(0) : 0;
    call.read_only_blocks = {.blocks = int_list(*blocks, "read_only_blocks", count, first),
                             .count = count};
  }
  check_contents(call, first);
  add_results(call, first);
  add_page_results(call, pages.block_table);
  return call;
}

void run(const CompactionCall& call, const Tensor& cache) {
  run_on_device_of(
      cache, [&] { run_on_cpu(call); },
      [&](auto stream) {
        check_on_cuda(call, stream);
        cuda::compact(call.moves(), stream);
      });
}

#if defined(ADSC_WITH_CUDA)
void check_on_cuda(const CompactionCall& call, cuda::Stream stream) {
  if (!device_checks() && call.read_only_blocks.count == 0) return;
  const Compaction& c = call.compaction;
  const int64_t blocks = c.placement == Placement::kPaged ? c.num_blocks : 0;
  const Tensor block_state = empty(call.results[0], {blocks}, aoti_torch_dtype_int32());
  cuda::check_compaction(c, call.read_only_blocks, data<uint32_t>(block_state), stream);
}
#endif

}  // namespace adsc::ops
