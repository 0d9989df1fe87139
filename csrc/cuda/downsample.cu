#include "chunks.h"
#include "copy.cuh"
#include "downsample.h"
#include "launch.h"
#include "shapes.h"

namespace adsc::cuda {
namespace {

// Of a block, while a launch is small: on an H100 7 % faster than kThreads with two accesses each
// at 30 MiB, and 1 % slower at 120.
constexpr int kFewThreads = 128;

__global__ void __launch_bounds__(kThreads)
    downsample_kernel(const __grid_constant__ RowMap map, const __grid_constant__ CopyTasks tasks) {
  __shared__ int64_t rows[kTileRows];
  int64_t number = blockIdx.x;
  const CopyTask& task = task_of(tasks, number);
  const Tile tile = tile_of(task, number, map.num_tokens);
  find_rows(map, tile.begin, tile.count, rows);
  copy_tile(task, tile, rows);
}

// One tensor whose rows take a block each, the common call. Every warp finds the row by itself, so
// nothing is shared, and there are no tiles to work out, which on one image costs time.
__global__ void __launch_bounds__(kThreads)
    row_kernel(const __grid_constant__ RowMap map, const __grid_constant__ RowCopy copy) {
  const auto columns = static_cast<int>(copy.row_bytes / static_cast<int64_t>(sizeof(uint4)));
  const int64_t row = blockIdx.x;
  const int64_t source = find_row(map, row);
  const auto* x = reinterpret_cast<const uint4*>(copy.x + source * copy.stride);
  auto* out = reinterpret_cast<uint4*>(copy.out + row * copy.row_bytes);
  uint4 values[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int column = static_cast<int>(threadIdx.x + k * blockDim.x);
    values[k] = uint4{};
    if (source >= 0 && column < columns) values[k] = x[column];
  }
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int column = static_cast<int>(threadIdx.x + k * blockDim.x);
    if (column < columns) store(out + column, values[k]);
  }
}

// Whether row_kernel has copied it; not where the rows are too narrow, too wide or not aligned.
bool copy_wide_rows(const RowMap& map, const RowCopy& copy, Stream stream) {
  constexpr int kLeastThreads = 64;
  const CopyTask task = copy_task(copy, map.num_tokens, kThreads, 1);
  if (task.column_bytes != 16 || task.columns > kThreads * kKept) return false;
  // Two accesses for each of many threads where there is much to do, as in copy_rows.
  const int64_t two_each = rounded_up((task.columns + 1) / 2, kWarp);
  const bool large = map.num_tokens * task.columns > 16 * enough_threads();
  const int64_t threads = large && two_each <= kThreads ? two_each : norm_group(task.columns);
  if (threads < kLeastThreads) return false;
  launch(row_kernel, map.num_tokens, static_cast<int>(threads), 0, stream, map, copy);
  return true;
}

}  // namespace

void copy_rows(const RowMap& map, std::span<const RowCopy> copies, Stream stream) {
  if (copies.size() == 1 && copy_wide_rows(map, copies[0], stream)) return;
  for (; !copies.empty(); copies = after(copies, kMaxCopies)) {
    int threads = kFewThreads;
    CopyTasks tasks = copy_tasks(up_to(copies, kMaxCopies), map.num_tokens, threads);
    if (tasks.num_tiles * threads > 4 * enough_threads()) {
      threads = kThreads;
      tasks = copy_tasks(up_to(copies, kMaxCopies), map.num_tokens, threads);
    }
    launch(downsample_kernel, tasks.num_tiles, threads, 0, stream, map, tasks);
  }
}

}  // namespace adsc::cuda
