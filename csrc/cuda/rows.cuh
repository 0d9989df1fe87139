// Which source row each output row of a block's tile comes from.
#pragma once

#include <cstdint>

#include "../movement.h"
#include "device.cuh"
#include "shapes.h"

namespace adsc::cuda {

constexpr int kTileRows = 256;  // output rows of a block's tile, at most
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

// The largest `value` of the block's threads. Has two barriers.
__device__ __forceinline__ int32_t largest(int32_t value, int32_t* warp_values) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  __syncthreads();  // warp_values may still be read from a call before
  if (threadIdx.x % kWarp == 0) warp_values[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
    value = warp_values[warp] > value ? warp_values[warp] : value;
  }
  return value;
}

// find_segment by all lanes of a warp, without its chain of loads. Each lane loads one of 32
// segments, a ballot tells how many of them begin at a row or before, and what is asked for comes
// from the lane that holds it. In a longer table ballots over every n-th dst find the 32 first: up
// to a thousand segments take one trip to memory more. (On an H100 a copy by a list of rows was 6 %
// faster than by this on one image and 0 to 3 % beyond; than by a search 10 % and 2 to 14 %.)

// The number of the first of the 32 segments of which one holds output row `row`, if any does.
__device__ __forceinline__ int32_t first_of_warp(const Segment* table, int32_t size, int64_t row) {
  const int32_t lane = threadIdx.x % kWarp;
  int32_t low = 0;  // the segment of the row is one of [low, low + left)
  for (int32_t left = size; left > kWarp;) {
    const int32_t step = (left + kWarp - 1) / kWarp;
    const int32_t offset = lane * step;
    const bool begun = offset < left && load(&table[low + offset].dst) <= row;
    const int32_t above = __popc(__ballot_sync(kAllLanes, begun)) - 1;
    const int32_t skipped = (above > 0 ? above : 0) * step;
    low += skipped;
    left = left - skipped < step ? left - skipped : step;
  }
  return low;
}

// Lane i gets the segment of output row begin + i, for i below `count`, or an empty one where the
// table has none.
__device__ __forceinline__ Segment segment_by_warp(const Segment* table, int32_t size,
                                                   int64_t begin, int count) {
  const int32_t lane = threadIdx.x % kWarp;
  Segment found{};
  int32_t low = first_of_warp(table, size, begin);
  int begun = kWarp;  // of the 32, at the last row: if all, the next ones may be too
  for (; begun == kWarp && low < size; low += kWarp) {
    Segment segment{};
    const bool has = low + lane < size;
    if (has) segment = table[low + lane];
    int32_t holder = -1;
    for (int i = 0; i < count; ++i) {
      begun = __popc(__ballot_sync(kAllLanes, has && segment.dst <= begin + i));
      if (lane == i) holder = begun - 1;
    }
    const auto take = [&](int32_t field) { return __shfl_sync(kAllLanes, field, holder & 31); };
    const Segment held{take(segment.dst),  take(segment.src),   take(segment.span),
                       take(segment.keep), take(segment.first), take(segment.pattern)};
    if (holder >= 0) found = held;
  }
  return found;
}

// The source of an output row past the last that the table moves (num_tokens may be an upper bound
// where the table was built on the device): it comes out as zeros.
constexpr int64_t kNoRow = -1;

// The source row of an output row that a segment holds, or kNoRow where it moves none there.
__device__ __forceinline__ int64_t moved_row(const Segment& segment, int64_t row) {
  const bool moved = segment.first + (row - segment.dst) < segment.keep;
  return moved ? source_row(segment, row) : kNoRow;
}

// The source row of one output row, for all lanes of a warp. Each lane works it out as if its
// segment held the row, so that one number comes from the lane that does, and not a segment.
__device__ __forceinline__ int64_t find_row(const RowMap& map, int64_t row) {
  if (map.indices64 != nullptr) return load(map.indices64 + row);
  if (map.indices32 != nullptr) return load(map.indices32 + row);
  const int32_t lane = threadIdx.x % kWarp;
  const int32_t size = map.num_segments;
  int64_t found = kNoRow;
  int begun = kWarp;  // as in segment_by_warp
  for (int32_t low = first_of_warp(map.segments, size, row); begun == kWarp && low < size;
       low += kWarp) {
    Segment segment{};
    const bool has = low + lane < size;
    if (has) segment = map.segments[low + lane];
    const bool begins = has && segment.dst <= row;
    begun = __popc(__ballot_sync(kAllLanes, begins));
    // Rows are numbered in 32 bits.
    const auto source = static_cast<int32_t>(begins ? moved_row(segment, row) : kNoRow);
    const int32_t held = __shfl_sync(kAllLanes, source, (begun - 1) & (kWarp - 1));
    if (begun > 0) found = held;
  }
  return found;
}

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
      const int rest = count - first < kWarp ? count - first : kWarp;
      const Segment segment = segment_by_warp(map.segments, map.num_segments, begin + first, rest);
      if (i < count) rows[i] = moved_row(segment, begin + i);
    }
  }
  __syncthreads();
}

}  // namespace adsc::cuda
