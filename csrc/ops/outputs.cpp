#include "ops/outputs.h"

#include <algorithm>
#include <array>

namespace adsc::ops {

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<int32_t> dtype) {
  std::array<int64_t, 8> few;  // in place of an allocation in nearly every call
  std::vector<int64_t> many(sizes.size() > few.size() ? sizes.size() : 0);
  int64_t* strides = many.empty() ? few.data() : many.data();
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype.value_or(dtype_of(like)),
      device_type_of(like), like.get_device_index(), &handle));
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
  tensors.reserve(outputs.size());
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
