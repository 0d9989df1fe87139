#include "chunks.h"
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

void copy_rows(const RowMap& map, std::span<const RowCopy> copies, Stream stream) {
  for (; !copies.empty(); copies = after(copies, kMaxCopies)) {
    const CopyTasks tasks = copy_tasks(up_to(copies, kMaxCopies), map.num_tokens, kThreads);
    launch(downsample_kernel, tasks.num_tiles, kThreads, 0, stream, map, tasks);
  }
}

}  // namespace adsc::cuda
