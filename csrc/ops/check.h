// What the ops check of their arguments, and how they allocate. On torch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "movement.h"
#include "text.h"

namespace adsc::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// std::invalid_argument reaches Python as ValueError.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(join(parts...));
}

// A tensor's shape in a message, put into words only if the message is needed.
struct Shape {
  const Tensor& tensor;
};
std::ostream& operator<<(std::ostream& out, const Shape& shape);

int32_t dtype_of(const Tensor& tensor);

// Whether an op may look at what the tensor holds.
bool host_can_read(const Tensor& tensor);

// That `tensor` lies where `like` does.
void check_device(const Tensor& tensor, const char* name, const Tensor& like,
                  const char* like_name);

// Rows along dimension 0, any distance apart, each dense inside.
struct RowLayout {
  int64_t num_rows;
  int64_t row_size;    // elements of a row
  int64_t row_stride;  // elements from one row to the next
};
RowLayout row_layout(const Tensor& x, const char* name);

// The map from output rows to the rows of x, from whichever of the two was given. What they hold is
// checked where the host can read it, on CPU. at_most: the table may move fewer than num_tokens
// rows, as one for a batch that is shorter than what was allocated.
RowMap row_map(const OptionalTensor& segments, const OptionalTensor& keep_indices,
               int64_t num_tokens, int64_t num_rows, const Tensor& x, const char* x_name,
               bool at_most = false);

// The element in which gradients are summed; a complex number is two of them.
Element element_of(const Tensor& tensor, const char* name);
int64_t real_parts(const Tensor& tensor);

const std::byte* bytes(const Tensor& tensor);
std::byte* mutable_bytes(const Tensor& tensor);

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
