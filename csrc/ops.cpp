// torch.ops.adsc_kernels: what each op accepts, what it allocates, and where it is registered.
// Built against PyTorch's stable ABI, so one binary serves every torch from 2.10 on. The kernels
// know no torch; they live in cpu/ (and cuda/).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/downsample.h"
#include "cpu/metadata.h"
#include "cpu/norm.h"
#include "cpu/rows.h"
#include "cpu/text.h"
#include "cpu/upsample_grad.h"
#include "segment.h"

namespace adsc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Checks. std::invalid_argument reaches Python as ValueError. ----

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(cpu::join(parts...));
}

// A tensor's shape in a message, put into words only if the message is needed.
struct Shape {
  const Tensor& tensor;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  const char* separator = "[";
  for (const int64_t size : shape.tensor.sizes()) {
    out << separator << size;
    separator = ", ";
  }
  return out << (shape.tensor.dim() == 0 ? "[]" : "]");
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Rows along dimension 0, any distance apart, each dense inside.
struct RowLayout {
  int64_t num_rows;
  int64_t row_size;    // elements of a row
  int64_t row_stride;  // elements from one row to the next
};

RowLayout row_layout(const Tensor& x, const char* name) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  check(sizes.size() >= 1, name, ": expected at least one dimension (rows first), got a scalar");
  int64_t row_size = 1;
  bool dense = true;
  for (size_t d = sizes.size(); d-- > 1;) {
    dense = dense && (sizes[d] == 1 || strides[d] == row_size);
    row_size *= sizes[d];
  }
  check(dense || row_size == 0 || sizes[0] == 0, name,
        ": expected rows that are contiguous inside (only dimension 0 may be strided), got shape ",
        Shape{x}, " with other strides");
  return {sizes[0], row_size, strides[0]};
}

// The map from output rows to the rows of `name`, from whichever of the two was given.
cpu::RowMap row_map(const OptionalTensor& segments, const OptionalTensor& keep_indices,
                    int64_t num_tokens, int64_t num_rows) {
  check(segments.has_value() != keep_indices.has_value(),
        "segments, keep_indices: expected exactly one of them, got ",
        segments.has_value() ? "both" : "neither");
  check(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  cpu::RowMap map;
  map.num_tokens = num_tokens;
  if (segments.has_value()) {
    check(segments->is_cpu(), "segments: expected the device of x, cpu");
    check(dtype_of(*segments) == aoti_torch_dtype_int32() && segments->dim() == 2 &&
              segments->size(1) == kSegmentColumns && segments->is_contiguous(),
          "segments: expected a contiguous int32 table [S, ", kSegmentColumns, "], got shape ",
          Shape{*segments});
    map.segments = static_cast<const Segment*>(segments->const_data_ptr());
    map.num_segments = static_cast<int32_t>(segments->size(0));
  } else {
    const int32_t dtype = dtype_of(*keep_indices);
    const bool wide = dtype == aoti_torch_dtype_int64();
    check(keep_indices->is_cpu(), "keep_indices: expected the device of x, cpu");
    check((wide || dtype == aoti_torch_dtype_int32()) && keep_indices->dim() == 1 &&
              keep_indices->is_contiguous(),
          "keep_indices: expected contiguous int32 or int64 [num_tokens], got shape ",
          Shape{*keep_indices});
    check(keep_indices->size(0) == num_tokens, "keep_indices: expected ", num_tokens,
          " of them (num_tokens), got ", keep_indices->size(0));
    if (wide) {
      map.indices64 = keep_indices->const_data_ptr<int64_t>();
    } else {
      map.indices32 = keep_indices->const_data_ptr<int32_t>();
    }
  }
  const std::string fault = find_fault(map, num_rows);
  check(fault.empty(), fault);
  return map;
}

// ---- Allocation and threads ----

// Contiguous and uninitialized, with the dtype and on the device of `like`.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype_of(like), device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// The shape of `like` with another number of rows.
Tensor empty_rows(const Tensor& like, int64_t num_rows) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = num_rows;
  return empty(like, sizes);
}

// Below this many bytes for each thread, waking it costs more than it saves.
constexpr int64_t kBytesPerThread = 128 << 10;

// Runs body(begin, end) over [0, count) on torch's own threads (torch.set_num_threads).
template <class Body>
void parallel_rows(int64_t count, int64_t bytes_per_row, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes_per_row));
  if (count <= grain) {
    if (count > 0) body(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, body);
  }
}

// ---- The ops on CPU ----

std::vector<Tensor> downsample_many_cpu(std::vector<Tensor> xs, OptionalTensor segments,
                                        OptionalTensor keep_indices, int64_t num_tokens) {
  check(!xs.empty(), "xs: expected at least one tensor, got none");
  std::vector<RowLayout> layouts;
  for (const Tensor& x : xs) {
    layouts.push_back(row_layout(x, "xs"));
    check(layouts.back().num_rows == layouts[0].num_rows,
          "xs: expected the same number of rows in all, got ", layouts[0].num_rows, " and ",
          layouts.back().num_rows);
  }
  const cpu::RowMap map = row_map(segments, keep_indices, num_tokens, layouts[0].num_rows);

  std::vector<Tensor> outs;
  std::vector<cpu::RowCopy> copies;
  int64_t bytes_per_row = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    outs.push_back(empty_rows(xs[i], num_tokens));
    const auto width = static_cast<int64_t>(xs[i].element_size());
    copies.push_back(
        {static_cast<const std::byte*>(xs[i].const_data_ptr()), layouts[i].row_stride * width,
         static_cast<std::byte*>(outs[i].mutable_data_ptr()), layouts[i].row_size * width});
    bytes_per_row += copies.back().row_bytes;
  }
  parallel_rows(num_tokens, bytes_per_row, [&](int64_t begin, int64_t end) {
    for (const cpu::RowCopy& copy : copies) copy_rows(map, copy, begin, end);
  });
  return outs;
}

Tensor downsample_cpu(Tensor x, OptionalTensor segments, OptionalTensor keep_indices,
                      int64_t num_tokens) {
  const RowLayout layout = row_layout(x, "x");
  const cpu::RowMap map = row_map(segments, keep_indices, num_tokens, layout.num_rows);
  Tensor out = empty_rows(x, num_tokens);
  const auto width = static_cast<int64_t>(x.element_size());
  const cpu::RowCopy copy{static_cast<const std::byte*>(x.const_data_ptr()),
                          layout.row_stride * width,
                          static_cast<std::byte*>(out.mutable_data_ptr()), layout.row_size * width};
  parallel_rows(num_tokens, copy.row_bytes,
                [&](int64_t begin, int64_t end) { copy_rows(map, copy, begin, end); });
  return out;
}

// The element in which gradients are summed; a complex number is two of them.
cpu::Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return cpu::Element::kFloat;
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return cpu::Element::kDouble;
    case ScalarType::BFloat16:
      return cpu::Element::kBFloat16;
    case ScalarType::Half:
      return cpu::Element::kHalf;
    default:
      throw std::invalid_argument(std::string(name) +
                                  ": expected float32, float64, bfloat16, float16, complex64 or "
                                  "complex128");
  }
}

int64_t real_parts(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::ComplexFloat || type == ScalarType::ComplexDouble ? 2 : 1;
}

Tensor upsample_grad_cpu(Tensor grad, OptionalTensor segments, OptionalTensor keep_indices,
                         int64_t num_rows) {
  const RowLayout layout = row_layout(grad, "grad");
  check(grad.is_contiguous(), "grad: expected a contiguous tensor, got shape ", Shape{grad});
  check(num_rows >= 0, "num_rows: expected at least 0, got ", num_rows);
  const cpu::Element element = element_of(grad, "grad");
  const cpu::RowMap map = row_map(segments, keep_indices, layout.num_rows, num_rows);
  Tensor out = empty_rows(grad, num_rows);
  const cpu::Takers takers = find_takers(map, num_rows);
  const cpu::RowScatter scatter{static_cast<const std::byte*>(grad.const_data_ptr()),
                                static_cast<std::byte*>(out.mutable_data_ptr()),
                                layout.row_size * real_parts(grad), element};
  parallel_rows(num_rows, layout.row_size * static_cast<int64_t>(grad.element_size()),
                [&](int64_t begin, int64_t end) { add_rows(takers, scatter, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> downsample_add_rms_norm_cpu(Tensor x, Tensor residual, Tensor weight,
                                                       OptionalTensor segments,
                                                       OptionalTensor keep_indices,
                                                       int64_t num_tokens, double eps) {
  check(x.dim() == 2, "x: expected shape [rows, hidden], got ", Shape{x});
  const RowLayout x_layout = row_layout(x, "x");
  const RowLayout residual_layout = row_layout(residual, "residual");
  check(residual.dim() == 2 && residual.size(0) == x.size(0) && residual.size(1) == x.size(1),
        "residual: expected the shape of x, ", Shape{x}, ", got ", Shape{residual});
  check(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous(),
        "weight: expected a contiguous [", x.size(1), "], got shape ", Shape{weight});
  check(dtype_of(residual) == dtype_of(x), "residual: expected the dtype of x");
  check(dtype_of(weight) == dtype_of(x), "weight: expected the dtype of x");
  check(real_parts(x) == 1, "x: expected float32, float64, bfloat16 or float16");
  check(residual.is_cpu(), "residual: expected the device of x, cpu");
  check(weight.is_cpu(), "weight: expected the device of x, cpu");
  check(eps >= 0, "eps: expected at least 0, got ", eps);
  const cpu::Element element = element_of(x, "x");
  const cpu::RowMap map = row_map(segments, keep_indices, num_tokens, x_layout.num_rows);

  Tensor normed = empty_rows(x, num_tokens);
  Tensor residual_out = empty_rows(x, num_tokens);
  const auto width = static_cast<int64_t>(x.element_size());
  const cpu::RowNorm norm{static_cast<const std::byte*>(x.const_data_ptr()),
                          x_layout.row_stride * width,
                          static_cast<const std::byte*>(residual.const_data_ptr()),
                          residual_layout.row_stride * width,
                          static_cast<const std::byte*>(weight.const_data_ptr()),
                          static_cast<std::byte*>(normed.mutable_data_ptr()),
                          static_cast<std::byte*>(residual_out.mutable_data_ptr()),
                          x_layout.row_size,
                          eps,
                          element};
  parallel_rows(num_tokens, 4 * x_layout.row_size * width,
                [&](int64_t begin, int64_t end) { add_rms_norm_rows(map, norm, begin, end); });
  return {normed, residual_out};
}

// keep: numerator and denominator; for the pattern "grid" those of the rows, then those of the
// columns.
cpu::Boundary boundary_of(const std::vector<int64_t>& keep, const std::string& pattern,
                          int64_t span_columns, int64_t max_height) {
  const bool grid = pattern == "grid";
  check(grid || pattern == "start" || pattern == "center" || pattern == "linspace",
        "pattern: expected start, center, linspace or grid, got ", pattern);
  check(keep.size() == (grid ? 4 : 2), "keep: expected ", grid ? 4 : 2, " integers, got ",
        keep.size());
  for (size_t i = 0; i < keep.size(); i += 2) {
    check(0 <= keep[i] && keep[i] <= keep[i + 1] && 0 < keep[i + 1] && keep[i + 1] < (1LL << 31),
          "keep: expected a fraction in [0, 1], got ", keep[i], "/", keep[i + 1]);
  }
  cpu::Boundary boundary{};
  boundary.pattern = pattern == "center" ? kCenter : pattern == "linspace" ? kLinspace : kStart;
  boundary.grid = grid;
  boundary.keep = {keep[0], keep[1]};
  boundary.span_blocks = 1;
  if (grid) {
    check(span_columns == 5, "spans: expected [N, 5] for the pattern grid, got [N, ", span_columns,
          "]");
    check(max_height >= 0 && max_height < (1LL << 31),
          "max_height: expected at least 0 for the pattern grid, got ", max_height);
    boundary.keep_cols = {keep[2], keep[3]};
    boundary.span_blocks = kept_count(max_height, keep[0], keep[1]);
  }
  return boundary;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rebuild_metadata_cpu(
    Tensor cu_seqlens, Tensor spans, std::vector<int64_t> keep, std::string pattern,
    int64_t max_height) {
  const int32_t int32 = aoti_torch_dtype_int32();
  check(dtype_of(cu_seqlens) == int32 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
            cu_seqlens.is_contiguous(),
        "cu_seqlens: expected contiguous int32 [B + 1], got shape ", Shape{cu_seqlens});
  check(spans.is_cpu(), "spans: expected the device of cu_seqlens, cpu");
  check(dtype_of(spans) == int32 && spans.dim() == 2 &&
            (spans.size(1) == 3 || spans.size(1) == 5) && spans.is_contiguous(),
        "spans: expected contiguous int32 [N, 3] or [N, 5], got shape ", Shape{spans});
  const cpu::Boundary boundary = boundary_of(keep, pattern, spans.size(1), max_height);
  const cpu::BatchLayout layout{
      static_cast<const int32_t*>(cu_seqlens.const_data_ptr()), cu_seqlens.size(0) - 1,
      static_cast<const int32_t*>(spans.const_data_ptr()), spans.size(0), spans.size(1)};
  const std::string fault = find_layout_fault(layout, boundary);
  check(fault.empty(), fault);

  const int64_t num_segments = layout.num_sequences + layout.num_spans * (1 + boundary.span_blocks);
  Tensor next_cu_seqlens = empty(cu_seqlens, {layout.num_sequences + 1});
  Tensor next_spans = empty(cu_seqlens, {layout.num_spans, boundary.grid ? 5 : 3});
  Tensor segments = empty(cu_seqlens, {num_segments, kSegmentColumns});
  Tensor seq_lens = empty(cu_seqlens, {layout.num_sequences});
  Tensor num_tokens = empty(cu_seqlens, {});
  Tensor max_seqlen = empty(cu_seqlens, {});
  const auto data = [](const Tensor& tensor) {
    return static_cast<int32_t*>(tensor.mutable_data_ptr());
  };
  rebuild_metadata(
      layout, boundary,
      {data(next_cu_seqlens), data(next_spans), static_cast<Segment*>(segments.mutable_data_ptr()),
       data(seq_lens), data(num_tokens), data(max_seqlen)});
  return {next_cu_seqlens, next_spans, segments, seq_lens, num_tokens, max_seqlen};
}

}  // namespace
}  // namespace adsc

STABLE_TORCH_LIBRARY(adsc_kernels, m) {
  m.def(
      "downsample(Tensor x, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) -> Tensor");
  m.def(
      "downsample_many(Tensor[] xs, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) "
      "-> Tensor[]");
  m.def(
      "upsample_grad(Tensor grad, Tensor? segments, Tensor? keep_indices, SymInt num_rows) "
      "-> Tensor");
  m.def(
      "downsample_add_rms_norm(Tensor x, Tensor residual, Tensor weight, Tensor? segments, "
      "Tensor? keep_indices, SymInt num_tokens, float eps) -> (Tensor, Tensor)");
  m.def(
      "rebuild_metadata(Tensor cu_seqlens, Tensor spans, int[] keep, str pattern, SymInt "
      "max_height) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(adsc_kernels, CPU, m) {
  m.impl("downsample", TORCH_BOX(&adsc::downsample_cpu));
  m.impl("downsample_many", TORCH_BOX(&adsc::downsample_many_cpu));
  m.impl("upsample_grad", TORCH_BOX(&adsc::upsample_grad_cpu));
  m.impl("downsample_add_rms_norm", TORCH_BOX(&adsc::downsample_add_rms_norm_cpu));
  m.impl("rebuild_metadata", TORCH_BOX(&adsc::rebuild_metadata_cpu));
}

// The CUDA kernels, once there are some, register here under the same names for the key CUDA,
// inside
// `#ifdef` of the build's CUDA switch; what the CPU functions check, bar contents, holds for them
// too.
