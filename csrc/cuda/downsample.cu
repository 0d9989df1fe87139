#include <algorithm>

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

// A row that takes a block. Every warp finds it by itself, so nothing is shared, and there are no
// tiles to work out.
__device__ __forceinline__ void copy_row(const RowMap& map, const RowCopy& copy, int64_t row) {
  const auto columns = static_cast<int>(copy.row_bytes / static_cast<int64_t>(sizeof(uint4)));
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

// One tensor of such rows, the common call: on one image to look for the task would cost time.
__global__ void __launch_bounds__(kThreads)
    row_kernel(const __grid_constant__ RowMap map, const __grid_constant__ RowCopy copy) {
  copy_row(map, copy, blockIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    downsample_kernel(const __grid_constant__ RowMap map, const __grid_constant__ CopyTasks tasks) {
  __shared__ int64_t rows[kTileRows];
  int64_t number = blockIdx.x;
  const CopyTask& task = task_of(tasks, number);
  if (task.whole_rows) {
    copy_row(map, task.copy, number);
    return;
  }
  const Tile tile = tile_of(task, number, map.num_tokens);
  find_rows(map, tile.begin, tile.count, rows);
  copy_tile(task, tile, rows);
}

// Of a block that takes one row; 0 where the rows are too narrow, too wide or not aligned.
int row_threads(const RowCopy& copy, int64_t num_tokens) {
  constexpr int kLeastThreads = 64;
  const CopyTask task = copy_task(copy, num_tokens, kThreads, 1);
  if (task.column_bytes != 16 || task.columns > kThreads * kKept) return 0;
  // Two accesses for each of many threads where there is much to do, as with tiles.
  const int64_t two_each = rounded_up((task.columns + 1) / 2, kWarp);
  const bool large = num_tokens * task.columns > 16 * enough_threads();
  const int64_t threads = large && two_each <= kThreads ? two_each : norm_group(task.columns);
  return threads < kLeastThreads ? 0 : static_cast<int>(threads);
}

// Gives a block to each row that occupies more than half of its threads.
void give_rows_blocks(CopyTasks& tasks, int64_t num_tokens, int threads) {
  for (CopyTask& task : std::span(tasks.tasks, tasks.count)) {
    const bool fits = task.columns <= threads * kKept && task.columns > threads / 2;
    if (task.column_bytes != 16 || !fits) continue;
    task.whole_rows = true;
    tasks.num_tiles += num_tokens - task.num_tiles;
    task.num_tiles = num_tokens;
  }
}

// Tensors of any widths in one launch.
void copy_together(const RowMap& map, std::span<const RowCopy> copies, Stream stream) {
  int threads = 0;
  for (const RowCopy& copy : copies) threads = std::max(threads, row_threads(copy, map.num_tokens));
  const bool rows = threads > 0;
  if (!rows) threads = kFewThreads;
  CopyTasks tasks = copy_tasks(copies, map.num_tokens, threads);
  if (rows) {
    give_rows_blocks(tasks, map.num_tokens, threads);
  } else if (tasks.num_tiles * threads > 4 * enough_threads()) {
    threads = kThreads;
    tasks = copy_tasks(copies, map.num_tokens, threads);
  }
  launch(downsample_kernel, tasks.num_tiles, threads, 0, stream, map, tasks);
}

}  // namespace

void copy_rows(const RowMap& map, std::span<const RowCopy> copies, Stream stream) {
  if (copies.size() == 1) {
    if (const int threads = row_threads(copies[0], map.num_tokens)) {
      launch(row_kernel, map.num_tokens, threads, 0, stream, map, copies[0]);
      return;
    }
  }
  for (; !copies.empty(); copies = after(copies, kMaxCopies)) {
    copy_together(map, up_to(copies, kMaxCopies), stream);
  }
}

}  // namespace adsc::cuda
