#include <algorithm>

#include "launch.h"
#include "metadata.cuh"
#include "rebuild_metadata.h"

namespace adsc::cuda {
namespace {

constexpr int kBlock = 1024;

__global__ void __launch_bounds__(kBlock)
    rebuild_metadata_kernel(const __grid_constant__ MetadataStep step) {
  __shared__ int32_t warp_sums[kBlock / kWarp];
  write_metadata(step, warp_sums);
}

}  // namespace

void rebuild_metadata(const MetadataStep& step, Stream stream) {
  const int64_t work = std::max(step.layout.num_spans, step.layout.num_sequences);
  int threads = kWarp;
  while (threads < kBlock && threads < work) threads *= 2;
  launch(rebuild_metadata_kernel, 1, threads, 0, stream, step);
}

}  // namespace adsc::cuda
