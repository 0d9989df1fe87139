// Residual add and RMSNorm of the rows of one tile: the part that downsample_add_rms_norm and
// boundary_step share. A group of threads takes a row; the row stays in their registers between the
// sum of its squares and its scaling, so that it is read once.
#pragma once

#include <cmath>
#include <cstdint>

#include "elements.cuh"
#include "launch.h"
#include "rows.cuh"

namespace adsc::cuda {

// How the work is cut.
struct NormShape {
  int threads;    // of a block
  int group;      // threads of a row
  int tile_rows;  // of a block: one for each group
  int64_t num_tiles;
  bool wide;  // accesses of 16 bytes
};

inline bool is_wide(const RowNorm& norm) {
  const uint64_t addresses =
      reinterpret_cast<uintptr_t>(norm.x) | reinterpret_cast<uintptr_t>(norm.residual) |
      reinterpret_cast<uintptr_t>(norm.weight) | reinterpret_cast<uintptr_t>(norm.normed) |
      reinterpret_cast<uintptr_t>(norm.residual_out) | static_cast<uint64_t>(norm.x_stride) |
      static_cast<uint64_t>(norm.residual_stride) |
      static_cast<uint64_t>(norm.width * element_bytes(norm.element));
  return addresses % 16 == 0;
}

// threads: of a block; 0: as many as fit the rows, at least kLeastThreads.
inline NormShape norm_shape(const RowNorm& norm, int64_t num_tokens, int threads = 0) {
  constexpr int kLeastThreads = 128;
  NormShape shape{};
  if (num_tokens == 0 || norm.width == 0) return shape;
  const int64_t bytes = element_bytes(norm.element);
  shape.wide = is_wide(norm);
  shape.group = norm_group(norm.width * bytes / (shape.wide ? 16 : bytes));
  shape.threads = threads != 0 ? threads : static_cast<int>(rounded_up(kLeastThreads, shape.group));
  shape.tile_rows = shape.threads / shape.group;
  shape.num_tiles = (num_tokens + shape.tile_rows - 1) / shape.tile_rows;
  return shape;
}

// x + residual, rounded to T; its squares are added to `squares`.
template <class T, class Access, class Compute>
__device__ __forceinline__ Access add_access(const Access& x, const Access& residual,
                                             Compute& squares) {
  const auto a = Elements<T, Access>::of(x);
  const auto b = Elements<T, Access>::of(residual);
  Elements<T, Access> sum;
#pragma unroll
  for (int i = 0; i < sum.kCount; ++i) {
    narrow(sum.values[i], widen(a.values[i]) + widen(b.values[i]));
    const Compute rounded = widen(sum.values[i]);
    squares += rounded * rounded;
  }
  return sum.access();
}

template <class T, class Access, class Compute>
__device__ __forceinline__ Access scale_access(const Access& sum, const Access& weight,
                                               Compute scale) {
  const auto h = Elements<T, Access>::of(sum);
  const auto w = Elements<T, Access>::of(weight);
  Elements<T, Access> normed;
#pragma unroll
  for (int i = 0; i < normed.kCount; ++i) {
    narrow(normed.values[i], widen(h.values[i]) * scale * widen(w.values[i]));
  }
  return normed.access();
}

// Of the tile's rows the one that this thread's group makes, which whole warps do.
__device__ __forceinline__ int row_of_group(int group) {
  return static_cast<int>(threadIdx.x) / group;
}

// Makes the output rows [begin, begin + count), one by each group of threads. source: the row that
// this thread's group takes; a negative one stands for zeros. T: the element; Access: what a thread
// reads and writes at once. `partial` is shared memory.
template <class T, class Access, class Compute>
__device__ __forceinline__ void norm_tile(const RowNorm& norm, int group, int64_t begin, int count,
                                          int64_t source, Compute (&partial)[kThreads / kWarp]) {
  const int64_t columns = norm.width / Elements<T, Access>::kCount;
  const int64_t row_bytes = norm.width * static_cast<int64_t>(sizeof(T));
  const int row = row_of_group(group);
  const int lane = static_cast<int>(threadIdx.x) % group;
  const bool live = row < count;
  const auto* x = reinterpret_cast<const Access*>(norm.x + source * norm.x_stride);
  const auto* residual =
      reinterpret_cast<const Access*>(norm.residual + source * norm.residual_stride);
  const auto* weight = reinterpret_cast<const Access*>(norm.weight);
  const int64_t offset = (begin + row) * row_bytes;
  auto* sum_out = reinterpret_cast<Access*>(norm.residual_out + offset);
  auto* normed_out = reinterpret_cast<Access*>(norm.normed + offset);

  Access sums[kKept];
  Access others[kKept];
  Access weights[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t column = lane + k * group;
    sums[k] = Access{};
    others[k] = Access{};
    if (source >= 0 && column < columns) {
      sums[k] = x[column];
      others[k] = residual[column];
    }
  }
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t column = lane + k * group;
    if (column < columns) weights[k] = load(weight + column);
  }
  Compute squares = 0;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t column = lane + k * group;
    sums[k] = add_access<T>(sums[k], others[k], squares);
    if (live && column < columns) store(sum_out + column, sums[k]);
  }
  if (live) {
#pragma unroll 1  // few rows are that long, and the code for it holds registers of all
    for (int64_t column = lane + kKept * group; column < columns; column += group) {
      Access a{}, b{};
      if (source >= 0) {
        a = x[column];
        b = residual[column];
      }
      store(sum_out + column, add_access<T>(a, b, squares));
    }
  }

  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(kAllLanes, squares, distance);
  }
  if (group > kWarp) {
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = squares;
    __syncthreads();
  }
  if (!live) return;
  if (group > kWarp) {
    squares = 0;
    const int warps = group / kWarp;
    for (int warp = 0; warp < warps; ++warp) squares += partial[row * warps + warp];
  }
  const Compute mean = squares / static_cast<Compute>(norm.width);
  // Rows of zeros stay zeros, with eps = 0 and with any weight.
  const bool zeros = source < 0;
  const Compute scale = 1 / std::sqrt(mean + static_cast<Compute>(norm.eps));
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t column = lane + k * group;
    if (column < columns) {
      store(normed_out + column,
            zeros ? Access{} : scale_access<T>(packed(sums[k]), packed(weights[k]), scale));
    }
  }
#pragma unroll 1
  for (int64_t column = lane + kKept * group; column < columns; column += group) {
    store(normed_out + column,
          zeros ? Access{} : scale_access<T>(sum_out[column], load(weight + column), scale));
  }
}

}  // namespace adsc::cuda
