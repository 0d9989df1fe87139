// What the Python tests steer the emulator by, and the memory that the ops get under it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "access.h"
#include "engine.h"

#define ADSC_SIMT_EXPORT extern "C" __attribute__((visibility("default")))

ADSC_SIMT_EXPORT void adsc_simt_configure(uint64_t seed, int resident, int64_t enough_threads,
                                          int races) {
  auto& options = adsc::simt::options();
  options.seed = seed;
  options.resident = resident;
  options.enough_threads = enough_threads;
  options.races = races != 0;
}

ADSC_SIMT_EXPORT void adsc_simt_allow(const void* begin, size_t bytes, int writable) {
  adsc::simt::allow(begin, bytes, writable != 0, true);
}

ADSC_SIMT_EXPORT void adsc_simt_allow_anything() { adsc::simt::allow_anything(); }

// In place of aoti_torch_empty_strided: the tensor lies amid guards, everything is filled with one
// byte, and the kernels may touch the tensor and no more.
extern "C" AOTITorchError adsc_simt_empty_strided(int64_t ndim, const int64_t* sizes,
                                                  const int64_t* strides, int32_t dtype,
                                                  int32_t device_type, int32_t device_index,
                                                  AtenTensorHandle* result) {
  constexpr int64_t kGuard = 512;  // elements
  int64_t extent = 1;
  for (int64_t d = 0; d < ndim; ++d) {
    extent = sizes[d] == 0 || extent == 0 ? 0 : extent + (sizes[d] - 1) * strides[d];
  }
  const int64_t size = extent + 2 * kGuard;
  const int64_t stride = 1;
  AtenTensorHandle whole;
  if (const auto error =
          aoti_torch_empty_strided(1, &size, &stride, dtype, device_type, device_index, &whole)) {
    return error;
  }
  void* data;
  aoti_torch_get_data_ptr(whole, &data);
  const auto width = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  std::memset(data, 0xa7, size * width);
  adsc::simt::allow(static_cast<std::byte*>(data) + kGuard * width, extent * width, true, false);
  const auto error = aoti_torch__reinterpret_tensor(whole, ndim, sizes, strides, kGuard, result);
  aoti_torch_delete_tensor_object(whole);
  return error;
}
