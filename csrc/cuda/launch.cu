#include <stdexcept>
#include <string>

#include "launch.h"

namespace adsc::cuda {

void refuse_grid(int64_t grid) {
  throw std::runtime_error("adsc_kernels: a launch of " + std::to_string(grid) +
                           " blocks is more than a grid can have");
}

void launch_failed(cudaError_t status) {
  cudaGetLastError();  // reported here; leave none behind for the caller's next check
  throw std::runtime_error(std::string("adsc_kernels: launch failed: ") +
                           cudaGetErrorString(status));
}

}  // namespace adsc::cuda
