// The one way kernels are launched. Under ADSC_SIMT an emulator on the CPU takes the place of this
// file and of device.cuh.
#pragma once

#if defined(ADSC_SIMT)
#include "../tests/simt/launch.h"
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "stream.h"

namespace adsc::cuda {

// A tile of fewer rows finds work for more multiprocessors: launchers make tiles large while this
// many threads are busy. 1024 for each of an H200's 132.
constexpr int64_t enough_threads() { return 132 * 1024; }

// Both throw std::runtime_error. They are apart, in launch.cu: <string> takes longer to compile,
// once for each architecture, than a small kernel.
[[noreturn]] void refuse_grid(int64_t grid);
[[noreturn]] void launch_failed(cudaError_t status);

// Puts the kernel on the stream of the current device: `grid` blocks in x, none for 0. A launch
// that fails throws; what goes wrong while the kernel runs is reported by a later call, as ever in
// CUDA.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t dynamic_bytes,
            Stream stream, const Arguments&... arguments) {
  if (grid == 0) return;
  if (grid > INT32_MAX) refuse_grid(grid);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status != cudaSuccess) launch_failed(status);
}

}  // namespace adsc::cuda
#endif
