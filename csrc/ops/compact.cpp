#include "ops/compact.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "cpu/compact.h"
#include "cuda/compact.h"
#include "ops/on_device.h"
#include "ops/ops.h"
#include "ops/parallel.h"

namespace adsc::ops {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

IntList int_list(const Tensor& list, const char* name, int64_t count, const Tensor& like) {
  const int32_t dtype = dtype_of(list);
  const bool wide = dtype == aoti_torch_dtype_int64();
  check_device(list, name, like, "caches[0]");
  check((wide || dtype == aoti_torch_dtype_int32()) && list.dim() == 1 && list.size(0) == count &&
            list.is_contiguous(),
        name, ": expected contiguous int32 or int64 [", count, "], got shape ", Shape{list});
  return {list.const_data_ptr(), wide};
}

IntList int_list(const OptionalTensor& list, const char* name, int64_t count, const Tensor& like) {
  return list.has_value() ? int_list(*list, name, count, like) : IntList{};
}

// Where the dimensions of a tensor are; -1: it has none of that name.
struct Axes {
  int64_t block, token, head, last;
};

// rank: that of the caches. Scales may lack the last dimension, or that and the heads.
Axes axes_of(const Tensor& x, int64_t rank, const std::string& layout) {
  const int64_t first = rank == 4 ? 1 : 0;
  const bool hnd = layout == "HND";
  if (x.dim() == rank - 2) return {first - 1, first, -1, -1};
  return {first - 1, first + hnd, first + !hnd, x.dim() == rank ? rank - 1 : -1};
}

CacheTensor cache_tensor(const Tensor& x, size_t i, const Compaction& c, const Axes& axes,
                         int32_t layer) {
  const auto size = [&](int64_t axis) { return axis < 0 ? 1 : x.size(axis); };
  const auto stride = [&](int64_t axis) {
    return axis < 0 ? 0 : x.stride(axis) * static_cast<int64_t>(x.element_size());
  };
  check(size(axes.last) == 1 || x.stride(axes.last) == 1, "caches[", i,
        "]: expected unit stride on the last dimension, got stride ",
        axes.last < 0 ? 0 : x.stride(axes.last));
  const int64_t heads = size(axes.head);
  int64_t line_bytes = size(axes.last) * static_cast<int64_t>(x.element_size());
  int64_t lines = heads;
  // Heads that lie behind one another are one line, unless each keeps rows of its own.
  if (c.index_heads == 1 && (heads == 1 || stride(axes.head) == line_bytes)) {
    line_bytes *= heads;
    lines = 1;
  }
  check(line_bytes <= kMost && lines <= kMost, "caches[", i, "]: expected rows below 2^31 bytes");
  check(c.index_heads == 1 || (axes.head >= 0 && heads == c.index_heads),
        "keep_indices: expected 1 or ", heads, " heads, as in caches[", i, "], got ",
        c.index_heads);
  return {static_cast<std::byte*>(x.mutable_data_ptr()),
          stride(axes.block),
          stride(axes.token),
          stride(axes.head),
          static_cast<int32_t>(line_bytes),
          static_cast<int32_t>(lines),
          layer};
}

// All but the placement, which it needs: the tensors' shapes are checked against that.
CompactionCall compaction_of(const CompactionArguments& a) {
  check(!a.caches.empty(), "caches: expected at least one tensor, got none");
  const Tensor& first = a.caches[0];
  const int64_t rank = first.dim();
  check(rank == 3 || rank == 4, "caches[0]: expected 3 or 4 dimensions, got shape ", Shape{first});
  check(a.layout == "NHD" || a.layout == "HND", "layout: expected NHD or HND, got ", a.layout);
  check(a.num_layers >= 1 && static_cast<int64_t>(a.caches.size()) % a.num_layers == 0,
        "num_layers: expected a divisor of the ", a.caches.size(), " caches, got ", a.num_layers);
  check(a.segments.has_value() != a.keep_indices.has_value(),
        "segments, keep_indices: expected exactly one of them, got ",
        a.segments.has_value() ? "both" : "neither");
  check(a.cu_kept.dim() == 1 && a.cu_kept.size(0) >= 1 && a.cu_kept.size(0) <= kMost,
        "cu_kept: expected shape [B + 1], got ", Shape{a.cu_kept});

  CompactionCall call;
  Compaction& c = call.compaction;
  const int64_t batch = a.cu_kept.size(0) - 1;
  c.batch = static_cast<int32_t>(batch);
  c.cu_kept = int_list(a.cu_kept, "cu_kept", batch + 1, first);
  c.cu_rows = int_list(a.cu_rows, "cu_rows", batch + 1, first);
  c.prefix_lens = int_list(a.prefix_lens, "prefix_lens", batch, first);
  c.seq_lens = int_list(a.seq_lens, "seq_lens", batch, first);
  check(a.cu_rows.has_value() || (a.seq_lens.has_value() && a.keep_indices.has_value()),
        "cu_rows: expected it with segments, and in place of seq_lens, got none");
  if (a.segments.has_value()) {
    check_device(*a.segments, "segments", first, "caches[0]");
    check(dtype_of(*a.segments) == aoti_torch_dtype_int32() && a.segments->dim() == 2 &&
              a.segments->size(1) == kSegmentColumns && a.segments->is_contiguous(),
          "segments: expected a contiguous int32 table [S, ", kSegmentColumns, "], got shape ",
          Shape{*a.segments});
    c.by_segments = true;
    c.segments = static_cast<const Segment*>(a.segments->const_data_ptr());
    c.num_segments = static_cast<int32_t>(a.segments->size(0));
  } else {
    const Tensor& indices = *a.keep_indices;
    const int32_t dtype = dtype_of(indices);
    const bool wide = dtype == aoti_torch_dtype_int64();
    check_device(indices, "keep_indices", first, "caches[0]");
    check((wide || dtype == aoti_torch_dtype_int32()) && indices.dim() == 3 &&
              indices.is_contiguous(),
          "keep_indices: expected contiguous int32 or int64 [layers or 1, heads or 1, rows], got "
          "shape ",
          Shape{indices});
    check(indices.size(0) == 1 || indices.size(0) == a.num_layers, "keep_indices: expected 1 or ",
          a.num_layers, " layers, got shape ", Shape{indices});
    check(indices.size(1) >= 1 && indices.size(1) <= kMost,
          "keep_indices: expected at least one head, got shape ", Shape{indices});
    c.indices = {indices.const_data_ptr(), wide};
    c.index_layers = static_cast<int32_t>(indices.size(0));
    c.index_heads = static_cast<int32_t>(indices.size(1));
    c.num_indices = indices.size(2);
  }

  const Axes axes = axes_of(first, rank, a.layout);
  c.num_blocks = axes.block < 0 ? 1 : first.size(axes.block);
  c.num_tokens = first.size(axes.token);
  check(c.num_tokens <= kMost || rank == 3, "caches[0]: expected below 2^31 tokens a block");
  for (size_t i = 0; i < a.caches.size(); ++i) {
    const Tensor& x = a.caches[i];
    check_device(x, "caches", first, "caches[0]");
    check(x.dim() <= rank && x.dim() >= rank - 2, "caches[", i, "]: expected ", rank - 2, " to ",
          rank, " dimensions, got shape ", Shape{x});
    const Axes own = axes_of(x, rank, a.layout);
    check((own.block < 0 || x.size(own.block) == c.num_blocks) && x.size(own.token) == c.num_tokens,
          "caches[", i, "]: expected ", c.num_blocks, " blocks of ", c.num_tokens,
          " tokens, as caches[0], got shape ", Shape{x});
    if (x.numel() == 0) continue;
    call.tensors.push_back(
        cache_tensor(x, i, c, own, static_cast<int32_t>(static_cast<int64_t>(i) % a.num_layers)));
  }
  return call;
}

void check_contents(const CompactionCall& call, const Tensor& like) {
  if (!host_can_read(like)) return;
  const std::string fault = cpu::find_fault(call.compaction, call.pinned);
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

// Where there are fewer lines than this for each thread, they are cut into columns, so that a
// single sequence in few tensors keeps all threads busy; but not into smaller ones than that, and
// no more than need be: a row that is moved whole is faster than its parts (by a fifth at 8 KiB).
constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kColumnBytes = 1 << 10;

struct Part {
  const CacheTensor* tensor;
  int32_t line;
  int64_t begin, end;  // bytes of the line
};

}  // namespace

void run_on_cpu(const CompactionCall& call) {
  cpu::write_outputs(call.compaction, call.outputs);
  const Compaction& c = call.compaction;
  // The moves, once for all tensors and heads that share them.
  const int64_t selections = int64_t{c.index_layers} * c.index_heads;
  std::vector<std::vector<cpu::Run>> runs(selections * c.batch);
  for (int64_t s = 0; s < selections; ++s) {
    for (int32_t b = 0; b < c.batch; ++b) {
      runs[s * c.batch + b] = cpu::find_runs(c, b, s * c.num_indices);
    }
  }
  int64_t rows = 0;
  for (const auto& moves : runs) {
    for (const cpu::Run& run : moves) rows += run.count;
  }
  std::vector<Part> parts;
  int64_t bytes = 0;
  int64_t lines = 0;
  for (const CacheTensor& tensor : call.tensors) lines += int64_t{tensor.num_lines} * c.batch;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = threads == 1 ? 1 : threads * kPartsPerThread;
  for (const CacheTensor& tensor : call.tensors) {
    const int64_t cuts = std::max<int64_t>(1, wanted / std::max<int64_t>(1, lines));
    const int64_t column = std::max(kColumnBytes, tensor.line_bytes / cuts);
    for (int32_t line = 0; line < tensor.num_lines; ++line) {
      for (int64_t begin = 0; begin < tensor.line_bytes; begin += column) {
        const int64_t end = std::min<int64_t>(begin + column, tensor.line_bytes);
        parts.push_back({&tensor, line, begin, end});
        bytes += end - begin;
      }
    }
  }
  const auto count = static_cast<int64_t>(parts.size()) * c.batch;
  if (count == 0) return;
  const int64_t bytes_per_item = bytes * (rows / selections) / count;
  parallel_rows(count, bytes_per_item, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part& part = parts[i / c.batch];
      const int64_t b = i % c.batch;
      const CacheTensor& tensor = *part.tensor;
      const int64_t selection =
          c.num_indices == 0 ? 0 : index_of(c, tensor.layer, part.line) / c.num_indices;
      cpu::move_runs(runs[selection * c.batch + b], tensor,
                     tensor.base + part.line * tensor.line_stride, part.begin, part.end);
    }
  });
}

#if defined(ADSC_WITH_CUDA)
void check_on_cuda(const CompactionCall& call, cuda::Stream stream) {
  if (!device_checks() && call.pinned.count == 0) return;
  const Compaction& c = call.compaction;
  const int64_t blocks = c.placement == Placement::kPaged ? c.num_blocks : 0;
  const Tensor block_state = empty(call.results[0], {blocks}, aoti_torch_dtype_int32());
  cuda::check_compaction(c, call.pinned, data<uint32_t>(block_state), stream);
}

namespace {
void run_on_cuda(const CompactionCall& call, const Tensor& like) {
  const OnDevice device(like);
  check_on_cuda(call, device.stream());
  cuda::compact(call.compaction, call.tensors.data(), static_cast<int>(call.tensors.size()),
                call.outputs, device.stream());
}
}  // namespace
#endif

CompactionCall dense_compaction(const CompactionArguments& a, const OptionalTensor& seq_starts) {
  CompactionCall call = compaction_of(a);
  Compaction& c = call.compaction;
  const Tensor& first = a.caches[0];
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

CompactionCall paged_compaction(const CompactionArguments& a, const Tensor& block_table,
                                int64_t block_size, bool edit_table, const OptionalTensor& pinned) {
  CompactionCall call = compaction_of(a);
  Compaction& c = call.compaction;
  const Tensor& first = a.caches[0];
  c.placement = Placement::kPaged;
  c.edit_table = edit_table;
  check(block_size >= 1 && block_size <= kMost, "block_size: expected at least 1, got ",
        block_size);
  if (first.dim() == 3) {
    check(c.num_tokens % block_size == 0, "block_size: expected a divisor of the ", c.num_tokens,
          " slots, got ", block_size);
    c.num_blocks = c.num_tokens / block_size;
    c.num_tokens = block_size;
    for (CacheTensor& tensor : call.tensors) tensor.block_stride = block_size * tensor.token_stride;
  } else {
    check(c.num_tokens == block_size, "block_size: expected ", c.num_tokens,
          ", the tokens of a block of caches[0], got ", block_size);
  }
  check(!edit_table || (c.index_layers == 1 && c.index_heads == 1),
        "edit_table: expected the same rows for all layers and heads, got keep_indices of shape ",
        a.keep_indices.has_value() ? join(Shape{*a.keep_indices}) : "");
  const int32_t dtype = dtype_of(block_table);
  const bool wide = dtype == aoti_torch_dtype_int64();
  check_device(block_table, "block_table", first, "caches[0]");
  check((wide || dtype == aoti_torch_dtype_int32()) && block_table.dim() == 2 &&
            block_table.size(0) == c.batch &&
            (block_table.numel() == 0 || block_table.size(1) == 1 || block_table.stride(1) == 1),
        "block_table: expected int32 or int64 [", c.batch,
        ", max_blocks] with unit stride within a row, got shape ", Shape{block_table});
  c.table = {block_table.const_data_ptr(), wide};
  c.table_stride = block_table.stride(0);
  c.table_width = block_table.size(1);
  if (pinned.has_value()) {
    call.pinned = {int_list(*pinned, "pinned", pinned->dim() == 1 ? pinned->size(0) : 0, first),
                   pinned->size(0)};
  }
  check_contents(call, first);
  add_results(call, first);
  const int64_t batch = c.batch;
  call.results.push_back(empty(first, {batch}, aoti_torch_dtype_int32()));
  call.results.push_back(empty(first, {batch + 1}, aoti_torch_dtype_int32()));
  call.results.push_back(edit_table ? empty(block_table, {batch, c.table_width})
                                    : empty(block_table, {0, 0}));
  call.outputs.last_page_len = data<int32_t>(call.results[2]);
  call.outputs.indptr = data<int32_t>(call.results[3]);
  call.outputs.table = edit_table ? call.results[4].mutable_data_ptr() : nullptr;
  return call;
}

std::tuple<Tensor, Tensor> compact_kv_cpu(std::vector<Tensor> caches, int64_t num_layers,
                                          OptionalTensor segments, OptionalTensor keep_indices,
                                          Tensor cu_kept, OptionalTensor cu_rows,
                                          OptionalTensor prefix_lens, OptionalTensor seq_lens,
                                          OptionalTensor seq_starts, std::string layout) {
  const CompactionCall call = dense_compaction(
      {caches, num_layers, segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, layout},
      seq_starts);
  run_on_cpu(call);
  return {call.results[0], call.results[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact_paged_kv_cpu(
    std::vector<Tensor> caches, int64_t num_layers, Tensor block_table, int64_t block_size,
    OptionalTensor segments, OptionalTensor keep_indices, Tensor cu_kept, OptionalTensor cu_rows,
    OptionalTensor prefix_lens, OptionalTensor seq_lens, bool edit_table, OptionalTensor pinned,
    std::string layout) {
  const CompactionCall call = paged_compaction(
      {caches, num_layers, segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, layout},
      block_table, block_size, edit_table, pinned);
  run_on_cpu(call);
  return {call.results[0], call.results[1], call.results[2], call.results[3], call.results[4]};
}

#if defined(ADSC_WITH_CUDA)

std::tuple<Tensor, Tensor> compact_kv_cuda(std::vector<Tensor> caches, int64_t num_layers,
                                           OptionalTensor segments, OptionalTensor keep_indices,
                                           Tensor cu_kept, OptionalTensor cu_rows,
                                           OptionalTensor prefix_lens, OptionalTensor seq_lens,
                                           OptionalTensor seq_starts, std::string layout) {
  const CompactionCall call = dense_compaction(
      {caches, num_layers, segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, layout},
      seq_starts);
  run_on_cuda(call, caches[0]);
  return {call.results[0], call.results[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact_paged_kv_cuda(
    std::vector<Tensor> caches, int64_t num_layers, Tensor block_table, int64_t block_size,
    OptionalTensor segments, OptionalTensor keep_indices, Tensor cu_kept, OptionalTensor cu_rows,
    OptionalTensor prefix_lens, OptionalTensor seq_lens, bool edit_table, OptionalTensor pinned,
    std::string layout) {
  const CompactionCall call = paged_compaction(
      {caches, num_layers, segments, keep_indices, cu_kept, cu_rows, prefix_lens, seq_lens, layout},
      block_table, block_size, edit_table, pinned);
  run_on_cuda(call, caches[0]);
  return {call.results[0], call.results[1], call.results[2], call.results[3], call.results[4]};
}

#endif

}  // namespace adsc::ops
