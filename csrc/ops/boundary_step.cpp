// boundary_step: norm, moves and metadata of one boundary.
#include "ops/boundary_step.h"

#include <cstring>

#include "cpu/downsample.h"
#include "cpu/metadata.h"
#include "cpu/norm.h"
#include "cpu/rows.h"
#include "cuda/check.h"
#include "ops/downsample.h"
#include "ops/norm.h"
#include "ops/on_device.h"
#include "ops/ops.h"
#include "ops/parallel.h"

namespace adsc::ops {

BoundaryCall boundary_call(const BoundaryArguments& a) {
  check(a.residual.has_value() == a.weight.has_value(),
        "residual, weight: expected both or neither, got only ",
        a.residual.has_value() ? "residual" : "weight");
  check(a.cu_seqlens.has_value() == a.spans.has_value(),
        "cu_seqlens, spans: expected both or neither, got only ",
        a.cu_seqlens.has_value() ? "cu_seqlens" : "spans");
  check(a.num_tokens >= 0, "num_tokens: expected at least 0, got ", a.num_tokens);

  const Tensor& hidden = a.hidden;
  const RowLayout hidden_layout = row_layout(hidden, "hidden");
  BoundaryCall call;
  if (a.cu_seqlens.has_value()) {
    check(!a.segments.has_value() && !a.keep_indices.has_value(),
          "segments, keep_indices: expected neither with cu_seqlens and spans");
    check_device(*a.cu_seqlens, "cu_seqlens", hidden, "hidden");
    call.metadata = metadata_of(*a.cu_seqlens, *a.spans, a.keep, a.pattern, a.max_height);
    call.map.num_tokens = a.num_tokens;
    call.map.num_rows = hidden_layout.num_rows;
  } else {
    call.map =
        row_map(a.segments, a.keep_indices, a.num_tokens, hidden_layout.num_rows, hidden, "hidden");
  }

  std::vector<Tensor> moved = a.others;
  if (a.residual.has_value()) {
    call.norm = norm_of(hidden, "hidden", *a.residual, *a.weight, a.num_tokens, a.eps);
    const std::vector<int64_t> sizes = sizes_with_rows(hidden, a.num_tokens);
    call.outputs = {{hidden, sizes}, {hidden, sizes}};
  } else {
    moved.insert(moved.begin(), hidden);
  }
  for (const Tensor& x : moved) {
    const RowLayout layout = row_layout(x, "others");
    check_device(x, "others", hidden, "hidden");
    check(layout.num_rows == hidden_layout.num_rows, "others: expected the rows of hidden, ",
          hidden_layout.num_rows, ", got ", layout.num_rows);
    call.outputs.push_back({x, sizes_with_rows(x, a.num_tokens)});
    call.copies.push_back(row_copy(x, layout));
  }
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

void run_on_cpu(const BoundaryCall& call) {
  RowMap map = call.map;
  const int64_t num_tokens = map.num_tokens;
  if (call.metadata.has_value()) {
    const MetadataCall& metadata = *call.metadata;
    const int64_t last = metadata.layout.cu_seqlens[metadata.layout.num_sequences];
    check(last <= map.num_rows, "cu_seqlens: expected at most the rows of hidden, ", map.num_rows,
          ", got ", last);
    cpu::rebuild_metadata(metadata.layout, metadata.boundary, metadata.stage);
    const int64_t total = *metadata.stage.num_tokens;
    check(total <= num_tokens, "num_tokens: expected at least the rows of the stage, ", total,
          ", got ", num_tokens);
    map.num_tokens = total;
    map.segments = metadata.stage.segments;
    map.num_segments = static_cast<int32_t>(metadata.outputs[2].sizes[0]);
  }

  int64_t bytes_per_row = 0;
  for (const RowCopy& copy : call.copies) bytes_per_row += copy.row_bytes;
  int64_t norm_bytes = 0;  // of a row of hidden
  if (call.norm.has_value()) {
    norm_bytes = call.norm->width * static_cast<int64_t>(call.outputs[0].like.element_size());
    bytes_per_row += 4 * norm_bytes;
  }
  parallel_rows(map.num_tokens, bytes_per_row, [&](int64_t begin, int64_t end) {
    if (call.norm.has_value()) cpu::add_rms_norm_rows(map, *call.norm, begin, end);
    for (const RowCopy& copy : call.copies) cpu::copy_rows(map, copy, begin, end);
  });
  const int64_t left = num_tokens - map.num_tokens;  // what num_tokens leaves over
  const auto zero = [&](std::byte* out, int64_t row_bytes) {
    if (left > 0) std::memset(out + map.num_tokens * row_bytes, 0, left * row_bytes);
  };
  for (const RowCopy& copy : call.copies) zero(copy.out, copy.row_bytes);
  if (call.norm.has_value()) {
    zero(call.norm->normed, norm_bytes);
    zero(call.norm->residual_out, norm_bytes);
  }
}

std::vector<Tensor> boundary_step_cpu(Tensor hidden, OptionalTensor residual, OptionalTensor weight,
                                      double eps, std::vector<Tensor> others,
                                      OptionalTensor segments, OptionalTensor keep_indices,
                                      OptionalTensor cu_seqlens, OptionalTensor spans,
                                      std::vector<int64_t> keep, std::string pattern,
                                      int64_t max_height, int64_t num_tokens) {
  BoundaryCall call = boundary_call({hidden, residual, weight, eps, others, segments, keep_indices,
                                     cu_seqlens, spans, keep, pattern, max_height, num_tokens});
  const std::vector<Tensor> outs = allocate(call.outputs);
  call.set_outputs(outs);
  run_on_cpu(call);
  return outs;
}

#if defined(ADSC_WITH_CUDA)

std::optional<cuda::LayoutStep> layout_step(const BoundaryCall& call) {
  if (!call.metadata.has_value()) return std::nullopt;
  return cuda::LayoutStep{call.metadata->layout, call.metadata->boundary, call.metadata->stage};
}

void check_on_cuda(const BoundaryCall& call, cuda::Stream stream) {
  if (call.metadata.has_value()) {
    cuda::check_layout(call.metadata->layout, call.metadata->boundary, call.map.num_rows, stream);
  } else {
    cuda::check_rows(call.map, stream);
  }
}

std::vector<Tensor> boundary_step_cuda(Tensor hidden, OptionalTensor residual,
                                       OptionalTensor weight, double eps,
                                       std::vector<Tensor> others, OptionalTensor segments,
                                       OptionalTensor keep_indices, OptionalTensor cu_seqlens,
                                       OptionalTensor spans, std::vector<int64_t> keep,
                                       std::string pattern, int64_t max_height,
                                       int64_t num_tokens) {
  BoundaryCall call = boundary_call({hidden, residual, weight, eps, others, segments, keep_indices,
                                     cu_seqlens, spans, keep, pattern, max_height, num_tokens});
  const std::vector<Tensor> outs = allocate(call.outputs);
  call.set_outputs(outs);
  const OnDevice device(hidden);
  if (device_checks()) check_on_cuda(call, device.stream());
  const std::optional<cuda::LayoutStep> layout = layout_step(call);
  cuda::boundary_step(call.map, layout.has_value() ? &*layout : nullptr,
                      call.norm.has_value() ? &*call.norm : nullptr, call.copies.data(),
                      static_cast<int>(call.copies.size()), device.stream());
  return outs;
}

#endif

}  // namespace adsc::ops
