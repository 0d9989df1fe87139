#include "ops/check.h"

namespace adsc::ops {
namespace {

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return join("cuda:", tensor.get_device_index());
  return join("device type ", device_type_of(tensor));
}

StridedMemory memory_at(const void* data, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {.address = reinterpret_cast<uintptr_t>(data),
          .element_bytes = static_cast<int64_t>(tensor.element_size()),
          .sizes = sizes.data(),
          .strides = tensor.strides().data(),
          .rank = sizes.size()};
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

int32_t device_type_of(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

bool is_int(const Tensor& tensor) {
  const int32_t dtype = dtype_of(tensor);
  return dtype == aoti_torch_dtype_int32() || dtype == aoti_torch_dtype_int64();
}

void check_device(const Tensor& tensor, const char* name, const Tensor& like,
                  const char* like_name) {
  if (tensor.get() == like.get()) return;
  if (device_type_of(tensor) == device_type_of(like) &&
      tensor.get_device_index() == like.get_device_index()) {
    return;
  }
  check(false, name, ": expected the device of ", like_name, ", ", device_name(like), ", got ",
        device_name(tensor));
}

void check_devices(const std::vector<Tensor>& tensors, const char* name, const Tensor& like,
                   const char* like_name) {
  const int32_t type = device_type_of(like);
  const auto index = like.get_device_index();
  for (const Tensor& tensor : tensors) {
    if (device_type_of(tensor) == type && tensor.get_device_index() == index) continue;
    check_device(tensor, name, like, like_name);
  }
}

StridedMemory memory_of(const Tensor& tensor) { return memory_at(tensor.const_data_ptr(), tensor); }

StridedMemory mutable_memory_of(const Tensor& tensor) {
  return memory_at(tensor.mutable_data_ptr(), tensor);
}

const std::byte* bytes(const Tensor& tensor) {
  return static_cast<const std::byte*>(tensor.const_data_ptr());
}

std::byte* mutable_bytes(const Tensor& tensor) {
  return static_cast<std::byte*>(tensor.mutable_data_ptr());
}

}  // namespace adsc::ops
