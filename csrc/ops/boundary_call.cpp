#include "ops/boundary_call.h"

#include <cstring>

#include "cpu/downsample.h"
#include "cpu/downsample_add_rms_norm.h"
#include "cpu/rebuild_metadata.h"
#include "cuda/check.h"
#include "ops/norm.h"
#include "ops/parallel.h"
#include "ops/rows.h"

namespace adsc::ops {
namespace {

// Where rows come from: a layout's metadata, or a table.
void set_map(const BoundaryArguments& a, int64_t num_rows, BoundaryCall& call) {
  if (!a.cu_seqlens.has_value()) {
    call.map = row_map(a.segments, a.keep_indices, a.num_tokens, num_rows, a.hidden, "hidden");
    return;
  }
  check(!a.segments.has_value() && !a.keep_indices.has_value(),
        "segments, keep_indices: expected neither with cu_seqlens and spans");
  check_device(*a.cu_seqlens, "cu_seqlens", a.hidden, "hidden");
  call.metadata = metadata_call({.cu_seqlens = *a.cu_seqlens,
                                 .spans = *a.spans,
                                 .keep = a.keep,
                                 .pattern = a.pattern,
                                 .max_height = a.max_height});
  call.map.num_tokens = a.num_tokens;
  call.map.num_rows = num_rows;
}

// The stage's metadata, and the map that it holds. Raises where the layout fits neither hidden nor
// num_tokens.
RowMap rebuilt_map(const MetadataCall& metadata, const RowMap& numbers) {
  const auto& [layout, boundary, stage] = metadata.step;
  const int64_t last = layout.cu_seqlens[layout.num_sequences];
  check(last <= numbers.num_rows, "cu_seqlens: expected at most the rows of hidden, ",
        numbers.num_rows, ", got ", last);
  cpu::rebuild_metadata(metadata.step);
  const int64_t total = *stage.num_tokens;
  check(total <= numbers.num_tokens, "num_tokens: expected at least the rows of the stage, ", total,
        ", got ", numbers.num_tokens);
  return {.num_tokens = total,
          .num_rows = numbers.num_rows,
          .segments = stage.segments,
          .num_segments = static_cast<int32_t>(metadata.num_segments())};
}

}  // namespace

BoundaryCall boundary_call(const BoundaryArguments& a) {
  check(a.residual.has_value() == a.weight.has_value(),
        "residual, weight: expected both or neither, got only ",
        a.residual.has_value() ? "residual" : "weight");
  check(a.cu_seqlens.has_value() == a.spans.has_value(),
        "cu_seqlens, spans: expected both or neither, got only ",
        a.cu_seqlens.has_value() ? "cu_seqlens" : "spans");
  check(a.num_tokens >= 0, "num_tokens: expected at least 0, got ", a.num_tokens);
  const Tensor& hidden = a.hidden;
  const int64_t num_rows = row_shape(hidden, "hidden").num_rows;
  BoundaryCall call;
  set_map(a, num_rows, call);

  constexpr size_t kOfNorm = 2, kOfMetadata = 6;
  call.outputs.reserve(a.others.size() + kOfNorm + kOfMetadata);
  call.copies.reserve(a.others.size() + 1);
  const auto move = [&](const Tensor& x) {
    const RowShape shape = row_shape(x, "others");
    check(shape.num_rows == num_rows, "others: expected the rows of hidden, ", num_rows, ", got ",
          shape.num_rows);
    call.outputs.push_back({.like = x, .sizes = sizes_with_rows(x, a.num_tokens)});
    call.copies.push_back(row_copy(x, shape));
  };
  if (a.residual.has_value()) {
    call.norm = row_norm({.x = hidden,
                          .x_name = "hidden",
                          .residual = *a.residual,
                          .weight = *a.weight,
                          .eps = a.eps});
    const Output rows{.like = hidden, .sizes = sizes_with_rows(hidden, a.num_tokens)};
    call.outputs.insert(call.outputs.end(), {rows, rows});
  } else {
    move(hidden);
  }
  check_devices(a.others, "others", hidden, "hidden");
  for (const Tensor& x : a.others) move(x);
  if (call.metadata.has_value()) {
    const std::vector<Output>& more = call.metadata->outputs;
    call.outputs.insert(call.outputs.end(), more.begin(), more.end());
  }
  return call;
}

void BoundaryCall::set_outputs(const std::vector<Tensor>& tensors) {
  const Tensor* next = tensors.data();
  if (norm.has_value()) {
    norm->normed = mutable_bytes(*next++);
    norm->residual_out = mutable_bytes(*next++);
  }
  for (RowCopy& copy : copies) copy.out = mutable_bytes(*next++);
  if (metadata.has_value()) metadata->set_outputs(next);
}

cuda::BoundaryMoves BoundaryCall::moves() const {
  return {.map = map,
          .metadata = metadata.has_value() ? &metadata->step : nullptr,
          .norm = norm.has_value() ? &*norm : nullptr,
          .copies = copies};
}

void run_on_cpu(const BoundaryCall& call) {
  const RowMap map = call.metadata.has_value() ? rebuilt_map(*call.metadata, call.map) : call.map;
  int64_t norm_bytes = 0;  // of a row of hidden
  if (call.norm.has_value()) {
    norm_bytes = call.norm->width * static_cast<int64_t>(call.outputs[0].like.element_size());
  }
  const int64_t row_bytes = bytes_per_row(call.copies) + 4 * norm_bytes;
  parallel_rows(map.num_tokens, row_bytes, [&](int64_t begin, int64_t end) {
    if (call.norm.has_value()) cpu::add_rms_norm_rows(map, *call.norm, begin, end);
    for (const RowCopy& copy : call.copies) cpu::copy_rows(map, copy, begin, end);
  });
  const int64_t left = call.map.num_tokens - map.num_tokens;  // what num_tokens leaves over
  const auto zero = [&](std::byte* out, int64_t bytes) {
    if (left > 0) std::memset(out + map.num_tokens * bytes, 0, left * bytes);
  };
  for (const RowCopy& copy : call.copies) zero(copy.out, copy.row_bytes);
  if (call.norm.has_value()) {
    zero(call.norm->normed, norm_bytes);
    zero(call.norm->residual_out, norm_bytes);
  }
}

#if defined(ADSC_WITH_CUDA)
void check_on_cuda(const BoundaryCall& call, cuda::Stream stream) {
  if (call.metadata.has_value()) {
    cuda::check_layout(call.metadata->step, call.map.num_rows, stream);
  } else {
    cuda::check_rows(call.map, stream);
  }
}
#endif

}  // namespace adsc::ops
