// Copying the rows of several tensors of any widths in one launch: how the work is cut, on the
// host, and the copy of one tile, on the device.
#pragma once

#include <cstdint>
#include <span>

#include "elements.cuh"
#include "launch.h"
#include "rows.cuh"

namespace adsc::cuda {

// Tensors of one launch, which travel as a kernel parameter; more take several launches.
constexpr int kMaxCopies = 16;

// One tensor, cut into tiles of rows and of columns. A column is what a thread moves at once.
struct CopyTask {
  RowCopy copy;
  bool whole_rows;       // each a block's, and no tiles
  int32_t column_bytes;  // 16, 8, 4, 2 or 1: the most that all its addresses are multiples of
  int32_t lanes;         // threads side by side on a row
  int32_t tile_rows;
  int64_t columns;  // of a row
  int64_t tile_columns;
  int64_t column_tiles;
  int64_t num_tiles;
};

struct CopyTasks {
  CopyTask tasks[kMaxCopies];
  int32_t count;
  int64_t num_tiles;  // of all
};

inline CopyTask copy_task(const RowCopy& copy, int64_t num_tokens, int threads, int per_thread) {
  CopyTask task{};
  task.copy = copy;
  if (copy.row_bytes == 0 || num_tokens == 0) return task;
  const uint64_t offsets =
      reinterpret_cast<uintptr_t>(copy.x) | reinterpret_cast<uintptr_t>(copy.out) |
      static_cast<uint64_t>(copy.stride) | static_cast<uint64_t>(copy.row_bytes) | 16;
  task.column_bytes = static_cast<int32_t>(offsets & -offsets);
  task.columns = copy.row_bytes / task.column_bytes;

  task.lanes = copy_lanes(task.columns, threads);
  const int64_t tile = static_cast<int64_t>(threads) * per_thread;
  task.tile_columns = task.columns < tile ? task.columns : tile;
  task.column_tiles = (task.columns + task.tile_columns - 1) / task.tile_columns;
  int64_t tile_rows = tile / rounded_up(task.columns, task.lanes);
  if (tile_rows > kTileRows) tile_rows = kTileRows;
  if (tile_rows < 1) tile_rows = 1;
  task.tile_rows = static_cast<int32_t>(tile_rows);
  task.num_tiles = (num_tokens + tile_rows - 1) / tile_rows * task.column_tiles;
  return task;
}

// Cuts at most kMaxCopies tensors into tiles of about as many bytes each: of four accesses for each
// of few threads, or two for each of many, and smaller where that leaves too few of them for every
// multiprocessor. (On an H100 more rows to a block gain nothing.)
inline CopyTasks copy_tasks(std::span<const RowCopy> copies, int64_t num_tokens, int threads) {
  CopyTasks tasks{};
  for (int per_thread = threads < kThreads ? 4 : 2;; per_thread /= 2) {
    tasks.count = static_cast<int32_t>(copies.size());
    tasks.num_tiles = 0;
    for (size_t i = 0; i < copies.size(); ++i) {
      tasks.tasks[i] = copy_task(copies[i], num_tokens, threads, per_thread);
      tasks.num_tiles += tasks.tasks[i].num_tiles;
    }
    if (per_thread == 1 || tasks.num_tiles * threads >= enough_threads()) return tasks;
  }
}

// The output rows [begin, begin + count) and the columns [first_column, end_column) of one tensor.
struct Tile {
  int64_t begin;
  int count;
  int64_t first_column;
  int64_t end_column;
};

__device__ __forceinline__ Tile tile_of(const CopyTask& task, int64_t number, int64_t num_tokens) {
  const int64_t row_tile = divide(number, task.column_tiles);
  const int64_t column_tile = number - row_tile * task.column_tiles;
  const int64_t begin = row_tile * task.tile_rows;
  const int64_t left = num_tokens - begin;
  const int64_t first_column = column_tile * task.tile_columns;
  const int64_t end_column = first_column + task.tile_columns;
  return {begin, static_cast<int>(left < task.tile_rows ? left : task.tile_rows), first_column,
          end_column < task.columns ? end_column : task.columns};
}

// rows: the source rows of the tile; a negative one stands for a row of zeros.
template <class Access>
__device__ __forceinline__ void copy_tile_by(const CopyTask& task, const Tile& tile,
                                             const int64_t* rows) {
  constexpr int kInFlight = 4;  // loads of a thread before its first store
  const int lane = threadIdx.x % task.lanes;
  const int row_step = blockDim.x / task.lanes;
  const int end = static_cast<int>(tile.end_column - tile.first_column);
  const int64_t offset = tile.first_column * static_cast<int64_t>(sizeof(Access));
  const std::byte* x = task.copy.x + offset;
  std::byte* out = task.copy.out + tile.begin * task.copy.row_bytes + offset;

  int row = threadIdx.x / task.lanes;
  int column = lane;
  if (column >= end) row = tile.count;  // idle: more lanes than columns
  while (row < tile.count) {
    Access values[kInFlight];
    Access* targets[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      targets[i] = nullptr;
      if (row < tile.count) {
        const int64_t source = rows[row];
        values[i] = Access{};
        if (source >= 0) {
          // A plain load: on an H100 one with a hint to the caches takes 2 to 3 % longer.
          values[i] = reinterpret_cast<const Access*>(x + source * task.copy.stride)[column];
        }
        targets[i] = reinterpret_cast<Access*>(out + row * task.copy.row_bytes) + column;
        column += task.lanes;
        if (column >= end) {
          column = lane;
          row += row_step;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (targets[i] != nullptr) store(targets[i], values[i]);
    }
  }
}

__device__ __forceinline__ void copy_tile(const CopyTask& task, const Tile& tile,
                                          const int64_t* rows) {
  with_access(task.column_bytes,
              [&]<class Access>(Access) { copy_tile_by<Access>(task, tile, rows); });
}

// The task that tile `number` of all belongs to; `number` becomes its number within that task.
__device__ __forceinline__ const CopyTask& task_of(const CopyTasks& tasks, int64_t& number) {
  int i = 0;
  while (number >= tasks.tasks[i].num_tiles) number -= tasks.tasks[i++].num_tiles;
  return tasks.tasks[i];
}

}  // namespace adsc::cuda
