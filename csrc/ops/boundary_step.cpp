// boundary_step: norm, moves and metadata of one boundary.
#include "cuda/boundary_step.h"

#include <cstring>

#include "cpu/downsample.h"
#include "cpu/metadata.h"
#include "cpu/norm.h"
#include "cpu/rows.h"
#include "cuda/check.h"
#include "ops/downsample.h"
#include "ops/metadata.h"
#include "ops/norm.h"
#include "ops/on_device.h"
#include "ops/ops.h"
#include "ops/parallel.h"

namespace adsc::ops {
namespace {

struct Step {
  RowMap map;
  std::optional<MetadataOutputs> metadata;
  std::optional<NormOutputs> norm;
  std::vector<RowCopy> copies;
  std::vector<Tensor> outs;  // hidden, residual if given, others, metadata
};

// Checked and allocated. With a layout, map holds only the numbers of rows.
Step step_of(const Tensor& hidden, const OptionalTensor& residual, const OptionalTensor& weight,
             double eps, const std::vector<Tensor>& others, const OptionalTensor& segments,
             const OptionalTensor& keep_indices, const OptionalTensor& cu_seqlens,
             const OptionalTensor& spans, const std::vector<int64_t>& keep,
             const std::string& pattern, int64_t max_height, int64_t num_tokens) {
  check(residual.has_value() == weight.has_value(),
        "residual, weight: expected both or neither, got only ",
        residual.has_value() ? "residual" : "weight");
  check(cu_seqlens.has_value() == spans.has_value(),
        "cu_seqlens, spans: expected both or neither, got only ",
        cu_seqlens.has_value() ? "cu_seqlens" : "spans");
  check(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);

  const RowLayout hidden_layout = row_layout(hidden, "hidden");
  Step step;
  if (cu_seqlens.has_value()) {
    check(!segments.has_value() && !keep_indices.has_value(),
          "segments, keep_indices: expected neither with cu_seqlens and spans");
    check_device(*cu_seqlens, "cu_seqlens", hidden, "hidden");
    step.metadata = metadata_of(*cu_seqlens, *spans, keep, pattern, max_height);
    step.map.num_tokens = num_tokens;
    step.map.num_rows = hidden_layout.num_rows;
  } else {
    step.map = row_map(segments, keep_indices, num_tokens, hidden_layout.num_rows, hidden, "hidden");
  }

  std::vector<Tensor> moved = others;
  if (residual.has_value()) {
    step.norm = norm_of(hidden, "hidden", *residual, *weight, num_tokens, eps);
    step.outs = {step.norm->normed, step.norm->residual_out};
  } else {
    moved.insert(moved.begin(), hidden);
  }
  for (const Tensor& x : moved) {
    const RowLayout layout = row_layout(x, "others");
    check_device(x, "others", hidden, "hidden");
    check(layout.num_rows == hidden_layout.num_rows, "others: expected the rows of hidden, ",
          hidden_layout.num_rows, ", got ", layout.num_rows);
    step.outs.push_back(empty_rows(x, num_tokens));
    step.copies.push_back(row_copy(x, layout, step.outs.back()));
  }
  if (step.metadata.has_value()) {
    const std::vector<Tensor>& tensors = step.metadata->tensors;
    step.outs.insert(step.outs.end(), tensors.begin(), tensors.end());
  }
  return step;
}

}  // namespace

std::vector<Tensor> boundary_step_cpu(Tensor hidden, OptionalTensor residual, OptionalTensor weight,
                                      double eps, std::vector<Tensor> others,
                                      OptionalTensor segments, OptionalTensor keep_indices,
                                      OptionalTensor cu_seqlens, OptionalTensor spans,
                                      std::vector<int64_t> keep, std::string pattern,
                                      int64_t max_height, int64_t num_tokens) {
  Step step = step_of(hidden, residual, weight, eps, others, segments, keep_indices, cu_seqlens,
                      spans, keep, pattern, max_height, num_tokens);
  int64_t total = num_tokens;
  if (step.metadata.has_value()) {
    const MetadataOutputs& metadata = *step.metadata;
    const int64_t last = metadata.layout.cu_seqlens[metadata.layout.num_sequences];
    check(last <= step.map.num_rows, "cu_seqlens: expected at most the rows of hidden, ",
          step.map.num_rows, ", got ", last);
    cpu::rebuild_metadata(metadata.layout, metadata.boundary, metadata.stage);
    total = *metadata.stage.num_tokens;
    check(total <= num_tokens, "num_tokens: expected at least the rows of the stage, ", total,
          ", got ", num_tokens);
    step.map.num_tokens = total;
    step.map.segments = metadata.stage.segments;
    step.map.num_segments = static_cast<int32_t>(metadata.tensors[2].size(0));
  }

  int64_t bytes_per_row = 0;
  for (const RowCopy& copy : step.copies) bytes_per_row += copy.row_bytes;
  int64_t norm_bytes = 0;  // of a row of hidden
  if (step.norm.has_value()) {
    norm_bytes = step.norm->rows.width * static_cast<int64_t>(hidden.element_size());
    bytes_per_row += 4 * norm_bytes;
  }
  parallel_rows(total, bytes_per_row, [&](int64_t begin, int64_t end) {
    if (step.norm.has_value()) cpu::add_rms_norm_rows(step.map, step.norm->rows, begin, end);
    for (const RowCopy& copy : step.copies) cpu::copy_rows(step.map, copy, begin, end);
  });
  const auto zero = [&](std::byte* out, int64_t row_bytes) {  // what num_tokens leaves over
    if (total < num_tokens) std::memset(out + total * row_bytes, 0, (num_tokens - total) * row_bytes);
  };
  for (const RowCopy& copy : step.copies) zero(copy.out, copy.row_bytes);
  if (step.norm.has_value()) {
    zero(step.norm->rows.normed, norm_bytes);
    zero(step.norm->rows.residual_out, norm_bytes);
  }
  return step.outs;
}

#if defined(ADSC_WITH_CUDA)

std::vector<Tensor> boundary_step_cuda(Tensor hidden, OptionalTensor residual,
                                       OptionalTensor weight, double eps,
                                       std::vector<Tensor> others, OptionalTensor segments,
                                       OptionalTensor keep_indices, OptionalTensor cu_seqlens,
                                       OptionalTensor spans, std::vector<int64_t> keep,
                                       std::string pattern, int64_t max_height,
                                       int64_t num_tokens) {
  const Step step = step_of(hidden, residual, weight, eps, others, segments, keep_indices,
                            cu_seqlens, spans, keep, pattern, max_height, num_tokens);
  std::optional<cuda::LayoutStep> layout;
  if (step.metadata.has_value()) {
    layout = {step.metadata->layout, step.metadata->boundary, step.metadata->stage};
  }
  const OnDevice device(hidden);
  if (device_checks()) {
    if (layout.has_value()) {
      cuda::check_layout(layout->layout, layout->boundary, step.map.num_rows, device.stream());
    } else {
      cuda::check_rows(step.map, device.stream());
    }
  }
  cuda::boundary_step(step.map, layout.has_value() ? &*layout : nullptr,
                      step.norm.has_value() ? &step.norm->rows : nullptr, step.copies.data(),
                      static_cast<int>(step.copies.size()), device.stream());
  return step.outs;
}

#endif

}  // namespace adsc::ops
