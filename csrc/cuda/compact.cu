#include "compact.h"

#include <utility>

#include "device.cuh"
#include "launch.h"

namespace adsc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;     // loads of a thread before its first store
constexpr int kMaxLanes = 32;    // threads side by side on a row
constexpr int kTileRows = 256;   // at most
constexpr int kEntries = 8;      // of the new block table, for each thread

// One tensor, cut into strips: some columns of one line of every row of one sequence. A column is what
// a thread moves at once. Strides in bytes.
struct Task {
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
// The small kind, K and V
// of 32 layers, keeps to the 4 KiB that parameters were limited to of old.
constexpr int kFewTasks = 64;
constexpr int kManyTasks = 512;

template <int kTasks>
struct Tasks {
  Task tasks[kTasks];
  int32_t count;
  int64_t num_blocks;  // of all; a launch of more than 2^31 is refused
};

Task task_of(const CacheTensor& tensor) {
  Task task{};
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

// ---- Moving rows ----

// Where the rows of a tile come from and go, in bytes from the base of the block's line; from < 0: the
// row stays.
struct Moves {
  int64_t from[kTileRows];
  int64_t to[kTileRows];
};

// The strip of one block.
struct Strip {
  const Task& task;
  SequenceRows rows;
  int64_t index;
  int32_t sequence;
  int32_t tile_rows;
};

__device__ __forceinline__ void find_moves(const Compaction& c, const Strip& strip, int32_t begin,
                                           int32_t end, Moves& moves) {
  const int32_t i = threadIdx.x;
  const int32_t row = begin + i;
  if (i >= strip.tile_rows) return;
  int64_t from = -1;
  if (row < end) {
    const int32_t source = source_of(c, strip.rows, strip.index, row);
    const int32_t target = place_of(c, strip.rows, strip.index, row);
    if (source != target) {
      from = offset_in(strip.task, place_in_cache(c, strip.sequence, source));
      moves.to[i] = offset_in(strip.task, place_in_cache(c, strip.sequence, target));
    }
  }
  moves.from[i] = from;
}

// The first row that may move: what is in front of the rows to choose from stays, and so does a text
// at their head.
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

template <class Access>
__device__ __forceinline__ void load_tile(const std::byte* base, const Moves& moves, int32_t row,
                                          int32_t row_step, int32_t tile_rows,
                                          Access (&values)[kInFlight]) {
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int32_t r = row + i * row_step;
    // Not through the read-only cache: the block itself writes what it has read.
    if (r < tile_rows && moves.from[r] >= 0) {
      values[i] = *reinterpret_cast<const Access*>(base + moves.from[r]);
    }
  }
}

// Why moving in place is safe. Let from(r) and to(r) be the old rows that row r of the new cache takes
// and replaces; from rises with r (checked, or a plan's), to rises, and to(r) <= from(r)
// (place_of). So what replaces an old row is either that row itself, which stays, or a row r with
// to(r) < from(r), and the one that still has to read row to(r), if any, is an r' with
// from(r') = to(r) < from(r), hence r' < r: in an earlier tile, or in this one. All loads of a tile
// come before the barrier that its stores come after; the next tile's loads may come before or after
// these stores, as they read from(r') >= to(r') > to(r). Nobody else reads or writes this strip: it
// belongs to one block, and other sequences to other blocks of the cache (sharing is checked).
template <class Access>
__device__ __forceinline__ void store_tile(std::byte* base, const Moves& moves, int32_t row,
                                           int32_t row_step, int32_t tile_rows,
                                           const Access (&values)[kInFlight]) {
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int32_t r = row + i * row_step;
    if (r < tile_rows && moves.from[r] >= 0) {
      store(reinterpret_cast<Access*>(base + moves.to[r]), values[i]);
    }
  }
}

// Rows [begin, end) of the new cache, tile after tile. The next tile's moves are found while this one's
// loads are under way. There are moves of three tiles, since a thread may find those of tile t + 1 while
// others still store tile t - 1.
template <class Access>
__device__ __forceinline__ void move_strip(const Compaction& c, const Strip& strip, int32_t line,
                                           int32_t strip_number, int32_t begin, int32_t end,
                                           Moves (&moves)[3]) {
  const Task& task = strip.task;
  const int32_t lane = threadIdx.x & (task.lanes - 1);
  const int32_t column = strip_number * task.strip_columns + lane;
  const int32_t columns = task.line_bytes / static_cast<int32_t>(sizeof(Access));
  std::byte* base = task.base + line * task.line_stride +
                    column * static_cast<int64_t>(sizeof(Access));
  const int32_t row_step = kThreads / task.lanes;
  // Threads past the last column find moves like the others, and move nothing.
  const bool idle = lane >= task.strip_columns || column >= columns;
  const int32_t row = idle ? kTileRows : static_cast<int32_t>(threadIdx.x) / task.lanes;

  find_moves(c, strip, begin, end, moves[0]);
  __syncthreads();
  int tile = 0;  // modulo 3
  for (int32_t first = begin; first < end; first += strip.tile_rows) {
    const int next = tile == 2 ? 0 : tile + 1;
    Access values[kInFlight];
    load_tile(base, moves[tile], row, row_step, strip.tile_rows, values);
    find_moves(c, strip, first + strip.tile_rows, end, moves[next]);
    __syncthreads();
    store_tile(base, moves[tile], row, row_step, strip.tile_rows, values);
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
      const int32_t left =
          static_cast<int>(threadIdx.x) >= step ? sums[threadIdx.x - step] : 0;
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

template <int kTasks>
__global__ void __launch_bounds__(kThreads)
    compact_kernel(const __grid_constant__ Compaction c,
                   const __grid_constant__ CompactionOutputs out,
                   const __grid_constant__ Tasks<kTasks> tasks) {
  __shared__ Moves moves[3];
  __shared__ int32_t sums[kThreads];
  const int64_t block = blockIdx.x;
  if (block >= tasks.num_blocks) {
    const int64_t number = block - tasks.num_blocks;
    if (number == 0) {
      write_lengths(c, out, sums);
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
  const Task& task = tasks.tasks[low];
  const auto number = static_cast<uint32_t>(block - task.first_block);
  const auto b = static_cast<int32_t>(number % c.batch);
  const auto strip_number = static_cast<int32_t>(number / c.batch % task.line_strips);
  const auto line = static_cast<int32_t>(number / c.batch / task.line_strips);

  const SequenceRows rows = sequence_rows(c, b);
  const int32_t begin = first_row(c, rows);
  const int32_t end = rows.new_total();
  if (rows.dropped() == 0 || begin >= end) return;
  const int32_t most = kInFlight * (kThreads / task.lanes);
  const Strip strip{task, rows, index_of(c, task.layer, line), b,
                    most < kTileRows ? most : kTileRows};
  switch (task.column_bytes) {
    case 16:
      return move_strip<uint4>(c, strip, line, strip_number, begin, end, moves);
    case 8:
      return move_strip<uint2>(c, strip, line, strip_number, begin, end, moves);
    case 4:
      return move_strip<uint32_t>(c, strip, line, strip_number, begin, end, moves);
    case 2:
      return move_strip<uint16_t>(c, strip, line, strip_number, begin, end, moves);
    default:
      return move_strip<uint8_t>(c, strip, line, strip_number, begin, end, moves);
  }
}

template <int kTasks>
void launch_compact(const Compaction& compaction, const CacheTensor* tensors, int count,
                    const CompactionOutputs& outputs, bool with_outputs, Stream stream) {
  static_assert(sizeof(Tasks<kTasks>) + sizeof(Compaction) + sizeof(CompactionOutputs) <=
                    (kTasks == kFewTasks ? 4096 : 32764),
                "what a kernel's parameters may hold");
  Tasks<kTasks> tasks{};
  tasks.count = count;
  for (int i = 0; i < count; ++i) {
    tasks.tasks[i] = task_of(tensors[i]);
    tasks.tasks[i].first_block = static_cast<int32_t>(tasks.num_blocks);
    tasks.num_blocks +=
        int64_t{tensors[i].num_lines} * tasks.tasks[i].line_strips * compaction.batch;
  }
  int64_t output_blocks = 0;
  if (with_outputs) {
    const int64_t entries =
        outputs.table == nullptr ? 0 : compaction.batch * compaction.table_width;
    output_blocks = 1 + (entries + kThreads * kEntries - 1) / (kThreads * kEntries);
  }
  launch(compact_kernel<kTasks>, tasks.num_blocks + output_blocks, kThreads, 0, stream, compaction,
         outputs, tasks);
}

// ---- ADSC_CHECK ----

__device__ __forceinline__ void check_list(const IntList& list, int64_t i, const char* name,
                                           bool rising) {
  if (list.data == nullptr) return;
  if (list[i] < 0 || list[i] > 0x7fffffff || (rising && list[i + 1] < list[i])) {
    trap(name, list[i], i);
  }
}

// One block for each sequence.
__global__ void __launch_bounds__(kThreads)
    check_kernel(const __grid_constant__ Compaction c) {
  const auto b = static_cast<int32_t>(blockIdx.x);
  check_list(c.cu_kept, b, "cu_kept: expected boundaries that rise from 0, got %lld at %lld", true);
  check_list(c.cu_rows, b, "cu_rows: expected boundaries that rise from 0, got %lld at %lld", true);
  check_list(c.seq_starts, b, "seq_starts: expected rising boundaries, got %lld at %lld", true);
  check_list(c.prefix_lens, b, "prefix_lens: expected at least 0, got %lld at %lld", false);
  check_list(c.seq_lens, b, "seq_lens: expected at least 0, got %lld at %lld", false);
  const SequenceRows rows = sequence_rows(c, b);
  if (c.cu_kept[0] != 0 || rows.kept > rows.source) {
    trap("cu_kept: expected at most %lld rows for sequence %lld, got %lld", rows.source, b,
         rows.kept);
  }
  if (!c.by_segments && c.cu_kept[c.batch] > c.num_indices) {
    trap("keep_indices: expected %lld rows (cu_kept), got %lld", c.cu_kept[c.batch],
         c.num_indices);
  }
  int64_t room = c.num_tokens;
  if (c.placement == Placement::kPacked) {
    room = c.seq_starts[b + 1] - c.seq_starts[b];
    if (c.seq_starts[c.batch] > c.num_tokens) {
      trap("seq_starts: expected boundaries of at most %lld, got %lld", c.num_tokens,
           c.seq_starts[c.batch]);
    }
  }
  if (c.placement == Placement::kPaged) room = c.table_width * c.num_tokens;
  if (rows.total > room || rows.total < rows.prefix + rows.source) {
    trap("seq_lens: expected %lld to %lld rows for sequence %lld, got %lld",
         rows.prefix + rows.source, room, b, rows.total);
  }
  if (c.placement == Placement::kPaged) {
    for (int32_t page = threadIdx.x; page < pages_of(c, rows.total); page += kThreads) {
      const int64_t entry = c.table[b * c.table_stride + page];
      if (entry < 0 || entry >= c.num_blocks) {
        trap("block_table: expected blocks in [0, %lld), got %lld at [%lld, %lld]", c.num_blocks,
             entry, b, page);
      }
    }
  }
  if (c.by_segments && c.num_segments == 0 && rows.kept > 0) {
    trap("segments: expected a table for %lld rows, got an empty one", rows.kept);
  }
  for (int32_t layer = 0; layer < c.index_layers; ++layer) {
    for (int32_t head = 0; head < c.index_heads; ++head) {
      const int64_t index = index_of(c, layer, head);
      for (int32_t i = threadIdx.x; i < rows.kept; i += kThreads) {
        if (c.by_segments) {
          const int64_t number = int64_t{rows.first_kept} + i;
          const Segment segment = c.segments[find_segment(c.segments, c.num_segments, number)];
          const int64_t kept = segment.first + (number - segment.dst);
          if (number < segment.dst || segment.first < 0 || kept >= segment.keep ||
              segment.keep > segment.span || segment.pattern < kStart ||
              segment.pattern > kLinspace) {
            trap("segments: no segment describes output row %lld", number);
          }
        }
        const int64_t source = source_of(c, rows, index, rows.prefix + i) - rows.prefix;
        const int64_t before =
            i == 0 ? -1 : source_of(c, rows, index, rows.prefix + i - 1) - rows.prefix;
        if (source <= before || source >= rows.source) {
          trap(c.by_segments
                   ? "segments: expected rising rows in [0, %lld) for sequence %lld, got %lld"
                   : "keep_indices: expected rising rows in [0, %lld) for sequence %lld, got %lld",
               rows.source, b, source);
        }
      }
    }
  }
}

}  // namespace

void compact(const Compaction& compaction, const CacheTensor* tensors, int count,
             const CompactionOutputs& outputs, Stream stream) {
  if (count <= kFewTasks) {
    return launch_compact<kFewTasks>(compaction, tensors, count, outputs, true, stream);
  }
  for (int first = 0; first < count; first += kManyTasks) {
    const int some = count - first < kManyTasks ? count - first : kManyTasks;
    launch_compact<kManyTasks>(compaction, tensors + first, some, outputs, first == 0, stream);
  }
}

void check_compaction(const Compaction& compaction, Stream stream) {
  launch(check_kernel, compaction.batch, kThreads, 0, stream, compaction);
}

}  // namespace adsc::cuda
