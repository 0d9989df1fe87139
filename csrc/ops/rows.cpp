#include "ops/rows.h"

#include <algorithm>

#include "cpu/rows.h"

namespace adsc::ops {

using torch::headeronly::ScalarType;

RowShape row_shape(const Tensor& x, const char* name) {
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
  return {.num_rows = sizes[0], .row_size = row_size, .row_stride = strides[0]};
}

RowCopy row_copy(const Tensor& x, const RowShape& shape) {
  const auto width = static_cast<int64_t>(x.element_size());
  return {.x = bytes(x), .stride = shape.row_stride * width, .row_bytes = shape.row_size * width};
}

int64_t bytes_per_row(const std::vector<RowCopy>& copies) {
  int64_t bytes = 0;
  for (const RowCopy& copy : copies) bytes += copy.row_bytes;
  return bytes;
}

SegmentTable segment_table(const Tensor& segments, const Tensor& x, const char* x_name) {
  check_device(segments, "segments", x, x_name);
  check(dtype_of(segments) == aoti_torch_dtype_int32() && segments.dim() == 2 &&
            segments.size(1) == kSegmentColumns && segments.is_contiguous(),
        "segments: expected a contiguous int32 table [S, ", kSegmentColumns, "], got shape ",
        Shape{segments});
  return {.segments = static_cast<const Segment*>(segments.const_data_ptr()),
          .count = static_cast<int32_t>(segments.size(0))};
}

RowMap row_map(const OptionalTensor& segments, const OptionalTensor& keep_indices,
               int64_t num_tokens, int64_t num_rows, const Tensor& x, const char* x_name,
               bool at_most) {
  check(segments.has_value() != keep_indices.has_value(),
        "segments, keep_indices: expected exactly one of them, got ",
        segments.has_value() ? "both" : "neither");
  check(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  RowMap map;
  map.num_tokens = num_tokens;
  map.num_rows = num_rows;
  if (segments.has_value()) {
    const SegmentTable table = segment_table(*segments, x, x_name);
    map.segments = table.segments;
    map.num_segments = table.count;
    check(map.num_segments > 0 || num_tokens == 0, "segments: expected a table for ", num_tokens,
          " output rows, got an empty one");
  } else {
    check_device(*keep_indices, "keep_indices", x, x_name);
    check(is_int(*keep_indices) && keep_indices->dim() == 1 && keep_indices->is_contiguous(),
          "keep_indices: expected contiguous int32 or int64 [num_tokens], got shape ",
          Shape{*keep_indices});
    check(keep_indices->size(0) == num_tokens, "keep_indices: expected ", num_tokens,
          " of them (num_tokens), got ", keep_indices->size(0));
    if (dtype_of(*keep_indices) == aoti_torch_dtype_int64()) {
      map.indices64 = keep_indices->const_data_ptr<int64_t>();
    } else {
      map.indices32 = keep_indices->const_data_ptr<int32_t>();
    }
  }
  if (host_can_read(x)) {
    if (at_most && map.num_segments > 0) {
      const Segment& last = map.segments[map.num_segments - 1];
      const int64_t end = int64_t{last.dst} + last.keep - last.first;
      map.num_tokens = std::min(num_tokens, std::max<int64_t>(end, 0));
    }
    const std::string fault = cpu::find_fault(map);
    check(fault.empty(), fault);
  } else {
    check(num_rows > 0 || num_tokens == 0, segments.has_value() ? "segments" : "keep_indices",
          ": expected source rows in [0, 0), as ", x_name, " has no rows, got ", num_tokens,
          " output rows");
  }
  return map;
}

Element element_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return Element::kFloat;
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return Element::kDouble;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
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

}  // namespace adsc::ops
