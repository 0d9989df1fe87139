// How the ops look at tensors, and what they say of a wrong one. On torch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "overlap.h"
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
int32_t device_type_of(const Tensor& tensor);

// The dtype of an index, a length or a block number.
bool is_int(const Tensor& tensor);

// Whether an op may look at what the tensor holds.
bool host_can_read(const Tensor& tensor);

// That `tensor` lies where `like` does.
void check_device(const Tensor& tensor, const char* name, const Tensor& like,
                  const char* like_name);
// The same of all.
void check_devices(const std::vector<Tensor>& tensors, const char* name, const Tensor& like,
                   const char* like_name);

// Where it lies, to be read or to be written; refers to the tensor.
StridedMemory memory_of(const Tensor& tensor);
StridedMemory mutable_memory_of(const Tensor& tensor);

const std::byte* bytes(const Tensor& tensor);
std::byte* mutable_bytes(const Tensor& tensor);

}  // namespace adsc::ops
