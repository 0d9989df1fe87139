// Which source row each output row of a block's tile comes from.
#pragma once

#include <cstdint>

#include "../movement.h"
#include "device.cuh"

namespace adsc::cuda {

constexpr int kThreads = 256;   // of a block, at most
constexpr int kTileRows = 256;  // output rows of a block's tile, at most
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of `value` over the threads before this one; `total` is that over all. Has two barriers.
__device__ __forceinline__ int32_t sum_before(int32_t value, int32_t* warp_sums, int32_t& total) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  int32_t sum = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();  // warp_sums may still be read from the call before
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (int other = 0; other < static_cast<int>(blockDim.x) / kWarp; ++other) {
    if (other == warp) before = total;
    total += warp_sums[other];
  }
  return before + sum - value;
}

// find_segment by all lanes of a warp, which look at 32 entries at once: a table of 32 rows takes
// one trip to memory, one of a thousand two.
__device__ __forceinline__ int32_t find_segment_by_warp(const Segment* table, int32_t count,
                                                        int64_t row) {
  const int32_t lane = threadIdx.x % kWarp;
  int32_t low = 0;  // the segment is one of [low, low + count)
  while (count > 1) {
    const int32_t step = (count + kWarp - 1) / kWarp;
    const int32_t offset = lane * step;
    const bool reached = offset < count && load(&table[low + offset].dst) <= row;
    const int32_t above = __popc(__ballot_sync(kAllLanes, reached)) - 1;
    const int32_t skipped = (above > 0 ? above : 0) * step;
    low += skipped;
    count = count - skipped < step ? count - skipped : step;
  }
  return low;
}

// The source of an output row past the last that the table moves (num_tokens may be an upper bound
// where the table was built on the device): it comes out as zeros.
constexpr int64_t kNoRow = -1;

// rows[i] = the source row of output row begin + i, for i in [0, count). All threads of the block
// call it; ends with a barrier.
__device__ __forceinline__ void find_rows(const RowMap& map, int64_t begin, int count,
                                          int64_t* rows) {
  const int lane = threadIdx.x % kWarp;
  for (int first = threadIdx.x - lane; first < count; first += blockDim.x) {
    const int i = first + lane;
    if (map.indices64 != nullptr) {
      if (i < count) rows[i] = load(map.indices64 + begin + i);
    } else if (map.indices32 != nullptr) {
      if (i < count) rows[i] = load(map.indices32 + begin + i);
    } else {
      // The warp's rows lie in the segments from that of its first row to that of its last.
      const int64_t last = begin + (first + kWarp < count ? first + kWarp : count) - 1;
      const int32_t low = find_segment_by_warp(map.segments, map.num_segments, begin + first);
      const int32_t high =
          low + find_segment_by_warp(map.segments + low, map.num_segments - low, last);
      if (i < count) {
        const int64_t row = begin + i;
        const int32_t s = low + find_segment(map.segments + low, high - low + 1, row);
        const Segment segment = map.segments[s];
        const bool moved = segment.first + (row - segment.dst) < segment.keep;
        rows[i] = moved ? source_row(segment, row) : kNoRow;
      }
    }
  }
  __syncthreads();
}

}  // namespace adsc::cuda
