#include <algorithm>

#include "launch.h"
#include "metadata.cuh"
#include "rebuild_metadata.h"

namespace adsc::cuda {
namespace {

constexpr int kBlock = 1024;
constexpr int64_t kMostBlocks = 128;  // each reads all spans

__global__ void clear_kernel(int32_t* max_seqlen) { *max_seqlen = 0; }

__global__ void __launch_bounds__(kBlock)
    rebuild_metadata_kernel(const __grid_constant__ MetadataStep step, int64_t block_sequences) {
  __shared__ int32_t warp_sums[kBlock / kWarp];
  const bool alone = gridDim.x == 1;
  const int64_t begin = blockIdx.x * block_sequences;
  const int64_t end = begin + block_sequences;
  const int64_t all = step.layout.num_sequences;
  const Part part =
      alone ? whole(step.layout) : part_of(step, begin, end < all ? end : all, warp_sums);
  const int32_t longest = write_metadata(step, part, warp_sums);
  if (threadIdx.x != 0) return;
  if (alone) {
    *step.stage.max_seqlen = longest;
  } else {
    atomicMax(step.stage.max_seqlen, longest);
  }
}

}  // namespace

void rebuild_metadata(const MetadataStep& step, Stream stream) {
  const int64_t num_spans = step.layout.num_spans;
  const int64_t num_sequences = step.layout.num_sequences;
  const int64_t block_sequences =
      std::max<int64_t>(kBlockSequences, (num_sequences + kMostBlocks - 1) / kMostBlocks);
  const int64_t blocks =
      std::max<int64_t>(1, (num_sequences + block_sequences - 1) / block_sequences);
  int threads = kWarp;
  while (threads < kBlock && threads < std::max(num_spans, num_sequences)) threads *= 2;
  if (blocks > 1) launch(clear_kernel, 1, 1, 0, stream, step.stage.max_seqlen);
  launch(rebuild_metadata_kernel, blocks, threads, 0, stream, step, block_sequences);
}

}  // namespace adsc::cuda
