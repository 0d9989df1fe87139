#include "ops/on_device.h"

#include <cstdlib>
#include <cstring>

#if !defined(ADSC_SIMT)
// Weak: a CPU-only torch lacks it, and the library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace adsc::ops {

#if defined(ADSC_SIMT)
OnDevice::OnDevice(const Tensor&) {}
#else
OnDevice::OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("adsc_kernels: this torch has no CUDA streams");
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
}
#endif

bool device_checks() {
  static const bool on = [] {
    const char* value = std::getenv("ADSC_CHECK");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return on;
}

}  // namespace adsc::ops
