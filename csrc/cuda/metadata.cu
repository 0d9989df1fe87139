#include "launch.h"
#include "layout.cuh"
#include "metadata.h"

namespace adsc::cuda {
namespace {

constexpr int kBlock = 1024;

__global__ void __launch_bounds__(kBlock)
    rebuild_metadata_kernel(const __grid_constant__ BatchLayout layout,
                            const __grid_constant__ Boundary boundary,
                            const __grid_constant__ StageMetadata stage) {
  __shared__ int32_t warp_sums[kBlock / kWarp];
  write_metadata(layout, boundary, stage, warp_sums);
}

}  // namespace

void rebuild_metadata(const BatchLayout& layout, const Boundary& boundary,
                      const StageMetadata& stage, Stream stream) {
  const int64_t work =
      layout.num_spans > layout.num_sequences ? layout.num_spans : layout.num_sequences;
  int threads = kWarp;
  while (threads < kBlock && threads < work) threads *= 2;
  launch(rebuild_metadata_kernel, 1, threads, 0, stream, layout, boundary, stage);
}

}  // namespace adsc::cuda
