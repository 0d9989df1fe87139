// The tensors that an op returns.
#pragma once

#include <optional>
#include <vector>

#include "ops/check.h"

namespace adsc::ops {

// Contiguous and uninitialized, on the device of `like`, with its dtype if none is given.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes,
             std::optional<int32_t> dtype = std::nullopt);

// The shape of `like` with another number of rows.
std::vector<int64_t> sizes_with_rows(const Tensor& like, int64_t num_rows);
Tensor empty_rows(const Tensor& like, int64_t num_rows);

// A contiguous tensor that an op writes, of the dtype of `like` and on its device.
struct Output {
  Tensor like;
  std::vector<int64_t> sizes;
};
std::vector<Tensor> allocate(const std::vector<Output>& outputs);

// That the tensors given are those.
void check_outputs(const std::vector<Tensor>& given, const std::vector<Output>& outputs,
                   const char* name);

}  // namespace adsc::ops
