// torch.ops.adsc_kernels: what each op accepts, what it allocates, and where it is registered. Built
// against PyTorch's stable ABI, so one binary serves every torch from 2.10 on. The kernels know no
// torch; they live in cpu/ (and cuda/).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/downsample.h"
#include "cpu/rows.h"
#include "cpu/upsample_grad.h"
#include "segment.h"

namespace adsc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Checks. std::invalid_argument reaches Python as ValueError. ----------------------------------

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d > 0 ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
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
        shape_text(x), " with other strides");
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
          shape_text(*segments));
    map.segments = static_cast<const Segment*>(segments->const_data_ptr());
    map.num_segments = static_cast<int32_t>(segments->size(0));
  } else {
    const int32_t dtype = dtype_of(*keep_indices);
    const bool wide = dtype == aoti_torch_dtype_int64();
    check(keep_indices->is_cpu(), "keep_indices: expected the device of x, cpu");
    check((wide || dtype == aoti_torch_dtype_int32()) && keep_indices->dim() == 1 &&
              keep_indices->is_contiguous(),
          "keep_indices: expected contiguous int32 or int64 [num_tokens], got shape ",
          shape_text(*keep_indices));
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

// ---- Allocation and threads ------------------------------------------------------------------------

// Contiguous, uninitialized: the shape of `like` with another number of rows.
Tensor empty_rows(const Tensor& like, int64_t num_rows) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = num_rows;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype_of(like), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
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

// ---- The ops on CPU --------------------------------------------------------------------------------

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
    copies.push_back({static_cast<const std::byte*>(xs[i].const_data_ptr()),
                      layouts[i].row_stride * width,
                      static_cast<std::byte*>(outs[i].mutable_data_ptr()),
                      layouts[i].row_size * width});
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
    case ScalarType::ComplexFloat: return cpu::Element::kFloat;
    case ScalarType::Double:
    case ScalarType::ComplexDouble: return cpu::Element::kDouble;
    case ScalarType::BFloat16: return cpu::Element::kBFloat16;
    case ScalarType::Half: return cpu::Element::kHalf;
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
  check(grad.is_contiguous(), "grad: expected a contiguous tensor, got shape ", shape_text(grad));
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

}  // namespace
}  // namespace adsc

STABLE_TORCH_LIBRARY(adsc_kernels, m) {
  m.def("downsample(Tensor x, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) -> Tensor");
  m.def(
      "downsample_many(Tensor[] xs, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) "
      "-> Tensor[]");
  m.def(
      "upsample_grad(Tensor grad, Tensor? segments, Tensor? keep_indices, SymInt num_rows) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(adsc_kernels, CPU, m) {
  m.impl("downsample", TORCH_BOX(&adsc::downsample_cpu));
  m.impl("downsample_many", TORCH_BOX(&adsc::downsample_many_cpu));
  m.impl("upsample_grad", TORCH_BOX(&adsc::upsample_grad_cpu));
}
