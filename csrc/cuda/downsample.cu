#include "copy.cuh"
#include "downsample.h"
#include "launch.h"

namespace adsc::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    downsample_kernel(const __grid_constant__ RowMap map, const __grid_constant__ CopyTasks tasks) {
  __shared__ int64_t rows[kTileRows];
  int64_t number = blockIdx.x;
  const CopyTask& task = task_of(tasks, number);
  const Tile tile = tile_of(task, number, map.num_tokens);
  find_rows(map, tile.begin, tile.count, rows);
  copy_tile(task, tile, rows);
}

}  // namespace

void copy_rows(const RowMap& map, const RowCopy* copies, int count, Stream stream) {
  for (int first = 0; first < count; first += kMaxCopies) {
    const int some = count - first < kMaxCopies ? count - first : kMaxCopies;
    const CopyTasks tasks = copy_tasks(copies + first, some, map.num_tokens, kThreads);
    launch(downsample_kernel, tasks.num_tiles, kThreads, 0, stream, map, tasks);
  }
}

}  // namespace adsc::cuda
