#include "ops/check.h"

#include <algorithm>

#include "cpu/rows.h"

namespace adsc::ops {
namespace {

using torch::headeronly::ScalarType;

int32_t device_type(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return join("cuda:", tensor.get_device_index());
  return join("device type ", device_type(tensor));
}

}  // namespace

bool host_can_read([[maybe_unused]] const Tensor& tensor) {
#if defined(ADSC_SIMT)
  return false;  // the emulator's tensors lie on the CPU and stand for a GPU's
#else
  return tensor.is_cpu();
#endif
}

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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

void check_device(const Tensor& tensor, const char* name, const Tensor& like,
                  const char* like_name) {
  if (device_type(tensor) == device_type(like) &&
      tensor.get_device_index() == like.get_device_index()) {
    return;
  }
  check(false, name, ": expected the device of ", like_name, ", ", device_name(like), ", got ",
        device_name(tensor));
}

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
    check_device(*segments, "segments", x, x_name);
    check(dtype_of(*segments) == aoti_torch_dtype_int32() && segments->dim() == 2 &&
              segments->size(1) == kSegmentColumns && segments->is_contiguous(),
          "segments: expected a contiguous int32 table [S, ", kSegmentColumns, "], got shape ",
          Shape{*segments});
    map.segments = static_cast<const Segment*>(segments->const_data_ptr());
    map.num_segments = static_cast<int32_t>(segments->size(0));
    check(map.num_segments > 0 || num_tokens == 0, "segments: expected a table for ", num_tokens,
          " output rows, got an empty one");
  } else {
    const int32_t dtype = dtype_of(*keep_indices);
    const bool wide = dtype == aoti_torch_dtype_int64();
    check_device(*keep_indices, "keep_indices", x, x_name);
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

const std::byte* bytes(const Tensor& tensor) {
  return static_cast<const std::byte*>(tensor.const_data_ptr());
}

std::byte* mutable_bytes(const Tensor& tensor) {
  return static_cast<std::byte*>(tensor.mutable_data_ptr());
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<int32_t> dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      dtype.value_or(dtype_of(like)), device_type(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

std::vector<int64_t> sizes_with_rows(const Tensor& like, int64_t num_rows) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = num_rows;
  return sizes;
}

Tensor empty_rows(const Tensor& like, int64_t num_rows) {
  return empty(like, sizes_with_rows(like, num_rows));
}

std::vector<Tensor> allocate(const std::vector<Output>& outputs) {
  std::vector<Tensor> tensors;
  for (const Output& output : outputs) tensors.push_back(empty(output.like, output.sizes));
  return tensors;
}

void check_outputs(const std::vector<Tensor>& given, const std::vector<Output>& outputs,
                   const char* name) {
  check(given.size() == outputs.size(), name, ": expected ", outputs.size(), " tensors, got ",
        given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    const auto sizes = given[i].sizes();
    const std::vector<int64_t>& wanted = outputs[i].sizes;
    check_device(given[i], name, outputs[i].like, "what it is made of");
    check(dtype_of(given[i]) == dtype_of(outputs[i].like) && given[i].is_contiguous() &&
              std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()),
          name, "[", i, "]: expected another shape or dtype, or a contiguous tensor, got shape ",
          Shape{given[i]});
  }
}

}  // namespace adsc::ops
