// Compacting a KV cache, by one block of threads: its strip of the rows, or its part of the
// outputs. For compact_kv_, compact_paged_kv_ and compress_step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "../compaction.h"
#include "device.cuh"
#include "elements.cuh"
#include "rows.cuh"

namespace adsc::cuda {

constexpr int kInFlight = 4;   // loads of a thread before its first store
constexpr int kMaxLanes = 32;  // threads side by side on a row
constexpr int kEntries = 8;    // of the new block table, for each thread

// One tensor, cut into strips: some columns of one line of every row of one sequence. A column is
// what a thread moves at once. Strides in bytes.
struct StripTask {
  std::byte* base;
  int64_t block_stride;
  int64_t token_stride;
  int64_t line_stride;
  int32_t line_bytes;
  int32_t layer;
  int32_t first_block;
  int32_t line_strips;
  uint8_t column_bytes;   // 16, 8, 4, 2 or 1: the most that all its addresses are multiples of
  uint8_t strip_columns;  // at most kMaxLanes
  uint8_t lanes;          // the power of two from there
};

// They travel as a kernel parameter, so that a captured graph holds them and nothing is uploaded.
template <int kTasks>
struct StripTasks {
  StripTask tasks[kTasks];
  int32_t count;
  int64_t num_blocks;  // of all; a launch of more than 2^31 is refused
};

inline StripTask strip_task(const CacheTensor& tensor) {
  StripTask task{};
  task.base = tensor.base;
  task.block_stride = tensor.block_stride;
  task.token_stride = tensor.token_stride;
  task.line_stride = tensor.line_stride;
  task.line_bytes = tensor.line_bytes;
  task.layer = tensor.layer;
  const uint64_t places = reinterpret_cast<uintptr_t>(tensor.base) |
                          static_cast<uint64_t>(tensor.block_stride) |
                          static_cast<uint64_t>(tensor.token_stride) |
                          static_cast<uint64_t>(tensor.num_lines > 1 ? tensor.line_stride : 0) |
                          static_cast<uint64_t>(tensor.line_bytes) | 16;
  task.column_bytes = static_cast<uint8_t>(places & -places);
  const int32_t columns = tensor.line_bytes / task.column_bytes;
  task.line_strips = (columns + kMaxLanes - 1) / kMaxLanes;
  task.strip_columns = static_cast<uint8_t>((columns + task.line_strips - 1) / task.line_strips);
  task.lanes = 1;
  while (task.lanes < task.strip_columns) task.lanes *= 2;
  return task;
}

// tensors: at most kTasks.
template <int kTasks>
StripTasks<kTasks> strip_tasks(const Compaction& compaction, std::span<const CacheTensor> tensors) {
  StripTasks<kTasks> tasks{};
  tasks.count = static_cast<int32_t>(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    tasks.tasks[i] = strip_task(tensors[i]);
    tasks.tasks[i].first_block = static_cast<int32_t>(tasks.num_blocks);
    tasks.num_blocks +=
        int64_t{tensors[i].num_lines} * tasks.tasks[i].line_strips * compaction.batch;
  }
  return tasks;
}

// Behind the blocks of the strips; none where nothing is reported.
inline int64_t output_blocks(const Compaction& compaction, const CompactionOutputs& outputs) {
  // A batch of no sequences has no lengths, and still an indptr.
  if (outputs.seq_lens == nullptr && outputs.indptr == nullptr) return 0;
  const int64_t entries = outputs.table == nullptr ? 0 : compaction.batch * compaction.table_width;
  return 1 + (entries + kThreads * kEntries - 1) / (kThreads * kEntries);
}

// ---- Moving rows ----

// Where the rows of a tile come from and go, in bytes from the base of the block's line; from < 0:
// the row stays.
struct Moves {
  int64_t from[kTileRows];
  int64_t to[kTileRows];
};

// What a block shares.
union CompactSpace {
  Moves moves[3];
  int32_t sums[kThreads];
};

// The strip of one block.
struct Strip {
  const StripTask& task;
  SequenceRows rows;
  int64_t index;
  int32_t sequence;
  int32_t tile_rows;
};

__device__ __forceinline__ void find_moves(const Compaction& c, const Strip& strip, int32_t begin,
                                           int32_t end, Moves& moves) {
  const int32_t i = threadIdx.x;
  if (i >= strip.tile_rows) return;
  int64_t from = -1;
  if (begin + i < end) {
    const RowMove move = move_at(c, strip.rows, strip.index, begin + i);
    if (move.from != move.to) {
      from = offset_in(strip.task, place_in_cache(c, strip.sequence, move.from));
      moves.to[i] = offset_in(strip.task, place_in_cache(c, strip.sequence, move.to));
    }
  }
  moves.from[i] = from;
}

// The first row that may move: what is in front of the rows to choose from stays, and so does a
// text at their head.
__device__ __forceinline__ int32_t first_row(const Compaction& c, const SequenceRows& rows) {
  if (!c.by_segments || rows.kept == 0) return rows.prefix;
  const int32_t s = find_segment(c.segments, c.num_segments, rows.first_kept);
  const Segment segment = c.segments[s];
  if (segment.keep != segment.span) return rows.prefix;
  const int64_t end = s + 1 < c.num_segments ? c.segments[s + 1].dst : c.cu_kept[c.batch];
  const int64_t source = segment.src + segment.first + (rows.first_kept - segment.dst);
  if (source != rows.first_row) return rows.prefix;  // something in front of it is dropped
  const int64_t run = end - rows.first_kept;
  return rows.prefix + static_cast<int32_t>(run < rows.kept ? run : rows.kept);
}

// `values`: an access of a narrow tensor lies in the first bytes of one.
template <class Access>
__device__ __forceinline__ void load_tile(const std::byte* base, const Moves& moves, int32_t row,
                                          int32_t row_step, int32_t tile_rows,
                                          uint4 (&values)[kInFlight]) {
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int32_t r = row + i * row_step;
    // Not through the read-only cache: the block itself writes what it has read.
    if (r < tile_rows && moves.from[r] >= 0) {
      const auto value = *reinterpret_cast<const Access*>(base + moves.from[r]);
      memcpy(&values[i], &value, sizeof value);
    }
  }
}

// Why moving in place is safe. Let from(r) and to(r) be the old rows that row r of the new cache
// takes and replaces; from rises with r (checked, or a plan's), and so does to (page_of). When row
// r is put in its place, the one that still has to read that place, if any, is an r' with from(r')
// = to(r). Where to(r) < from(r), that is < from(r), hence r' < r. Where to(r) > from(r), in a page
// that is moved backwards, r' > r, and r' is of the same page. Either way r' comes before r in the
// order of move_at: in an earlier tile, or in this one. All loads of a tile come before the barrier
// that its stores come after; the next tile's loads may come before or after these stores, as no
// row of a later tile takes what one of this tile replaces. Nobody else reads or writes this strip:
// it belongs to one block, and other sequences to other blocks of the cache (sharing is checked).
template <class Access>
__device__ __forceinline__ void store_tile(std::byte* base, const Moves& moves, int32_t row,
                                           int32_t row_step, int32_t tile_rows,
                                           const uint4 (&values)[kInFlight]) {
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int32_t r = row + i * row_step;
    if (r < tile_rows && moves.from[r] >= 0) {
      Access value;
      memcpy(&value, &values[i], sizeof value);
      store(reinterpret_cast<Access*>(base + moves.to[r]), value);
    }
  }
}

// Rows [begin, end) of the new cache, tile after tile. The next tile's moves are found while this
// one's loads are under way. There are moves of three tiles, since a thread may find those of tile
// t + 1 while others still store tile t - 1.
//
// The code that finds moves is by far the longest, and is here once: the first round does no more
// than find those of the first tile, and the width of a column is asked in each round.
__device__ __forceinline__ void move_strip(const Compaction& c, const Strip& strip, int32_t line,
                                           int32_t strip_number, int32_t begin, int32_t end,
                                           Moves (&moves)[3]) {
  const StripTask& task = strip.task;
  const int32_t lane = threadIdx.x & (task.lanes - 1);
  const int32_t column = strip_number * task.strip_columns + lane;
  const int32_t columns = task.line_bytes / task.column_bytes;
  std::byte* base =
      task.base + line * task.line_stride + column * static_cast<int64_t>(task.column_bytes);
  const int32_t row_step = kThreads / task.lanes;
  // Threads past the last column find moves like the others, and move nothing.
  const bool idle = lane >= task.strip_columns || column >= columns;
  const int32_t row = idle ? kTileRows : static_cast<int32_t>(threadIdx.x) / task.lanes;

  int tile = 2;  // modulo 3
  for (int32_t first = begin - strip.tile_rows; first < end; first += strip.tile_rows) {
    const int next = tile == 2 ? 0 : tile + 1;
    uint4 values[kInFlight];
    if (first >= begin) {
      with_access(task.column_bytes, [&]<class Access>(Access) {
        load_tile<Access>(base, moves[tile], row, row_step, strip.tile_rows, values);
      });
    }
    find_moves(c, strip, first + strip.tile_rows, end, moves[next]);
    __syncthreads();
    if (first >= begin) {
      with_access(task.column_bytes, [&]<class Access>(Access) {
        store_tile<Access>(base, moves[tile], row, row_step, strip.tile_rows, values);
      });
    }
    tile = next;
  }
}

// ---- Outputs ----

// By one block: lengths, slots, and the running sum of pages.
__device__ __forceinline__ void write_lengths(const Compaction& c, const CompactionOutputs& out,
                                              int32_t (&sums)[kThreads]) {
  int32_t before = 0;
  if (threadIdx.x == 0 && out.indptr != nullptr) out.indptr[0] = 0;
  for (int32_t first = 0; first < c.batch; first += kThreads) {
    const int32_t b = first + static_cast<int32_t>(threadIdx.x);
    int32_t pages = 0;
    if (b < c.batch) {
      const SequenceRows rows = sequence_rows(c, b);
      out.seq_lens[b] = rows.new_total();
      out.slots[b] = next_slot(c, rows, b);
      if (out.indptr != nullptr) {
        pages = pages_of(c, rows.new_total());
        out.last_page_len[b] = last_page_len(c, rows.new_total());
      }
    }
    if (out.indptr == nullptr) continue;
    sums[threadIdx.x] = pages;
    for (int step = 1; step < kThreads; step *= 2) {
      __syncthreads();
      const int32_t left = static_cast<int>(threadIdx.x) >= step ? sums[threadIdx.x - step] : 0;
      __syncthreads();
      sums[threadIdx.x] += left;
    }
    __syncthreads();
    if (b < c.batch) out.indptr[b + 1] = before + sums[threadIdx.x];
    before += sums[kThreads - 1];
    __syncthreads();
  }
}

__device__ __forceinline__ void write_table(const Compaction& c, const CompactionOutputs& out,
                                            int64_t first) {
  for (int i = 0; i < kEntries; ++i) {
    const int64_t entry = first + static_cast<int64_t>(i) * kThreads + threadIdx.x;
    if (entry >= c.batch * c.table_width) return;
    const auto b = static_cast<int32_t>(entry / c.table_width);
    const auto page = static_cast<int32_t>(entry - b * c.table_width);
    set_table_entry(c, out, b, page, table_entry(c, sequence_rows(c, b), b, page));
  }
}

// What block `block` of a compaction does; of kThreads threads.
template <int kTasks>
__device__ __forceinline__ void compact_block(const Compaction& c, const CompactionOutputs& out,
                                              const StripTasks<kTasks>& tasks, int64_t block,
                                              CompactSpace& space) {
  if (block >= tasks.num_blocks) {
    const int64_t number = block - tasks.num_blocks;
    if (number == 0) {
      write_lengths(c, out, space.sums);
    } else {
      write_table(c, out, (number - 1) * kThreads * kEntries);
    }
    return;
  }
  int32_t low = 0;  // the task is one of [low, high)
  int32_t high = tasks.count;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (tasks.tasks[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const StripTask& task = tasks.tasks[low];
  const auto number = static_cast<uint32_t>(block - task.first_block);
  const auto b = static_cast<int32_t>(number % c.batch);
  const auto strip_number = static_cast<int32_t>(number / c.batch % task.line_strips);
  const auto line = static_cast<int32_t>(number / c.batch / task.line_strips);

  const SequenceRows rows = sequence_rows(c, b);
  int32_t begin = first_row(c, rows);
  if (c.edit_table) begin -= begin % static_cast<int32_t>(c.num_tokens);  // whole pages
  const int32_t end = rows.new_total();
  if (rows.dropped() == 0 || begin >= end) return;
  const int32_t most = kInFlight * (kThreads / task.lanes);
  const Strip strip{task, rows, index_of(c, task.layer, line), b,
                    most < kTileRows ? most : kTileRows};
  move_strip(c, strip, line, strip_number, begin, end, space.moves);
}

}  // namespace adsc::cuda
