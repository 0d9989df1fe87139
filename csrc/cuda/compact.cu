#include "chunks.h"
#include "compact.cuh"
#include "compact.h"
#include "launch.h"

namespace adsc::cuda {
namespace {

// Tensors of a launch. The small kind, K and V of 32 layers, keeps to the 4 KiB that parameters
// were limited to of old.
constexpr int kFewTasks = 64;
constexpr int kManyTasks = 512;

template <int kTasks>
__global__ void __launch_bounds__(kThreads)
    compact_kernel(const __grid_constant__ Compaction c,
                   const __grid_constant__ CompactionOutputs out,
                   const __grid_constant__ StripTasks<kTasks> tasks) {
  __shared__ CompactSpace space;
  compact_block(c, out, tasks, blockIdx.x, space);
}

// tensors: at most kTasks of the moves'.
template <int kTasks>
void launch_compact(const CacheMoves& moves, std::span<const CacheTensor> tensors,
                    const CompactionOutputs& outputs, Stream stream) {
  static_assert(sizeof(StripTasks<kTasks>) + sizeof(Compaction) + sizeof(CompactionOutputs) <=
                    (kTasks == kFewTasks ? 4096 : 32764),
                "what a kernel's parameters may hold");
  const Compaction& compaction = moves.compaction;
  const auto tasks = strip_tasks<kTasks>(compaction, tensors);
  launch(compact_kernel<kTasks>, tasks.num_blocks + output_blocks(compaction, outputs), kThreads, 0,
         stream, compaction, outputs, tasks);
}

// ---- ADSC_CHECK ----

__device__ __forceinline__ void check_list(const IntList& list, int64_t i, const char* name,
                                           bool rising) {
  if (list.data == nullptr) return;
  if (list[i] < 0 || list[i] > 0x7fffffff || (rising && list[i + 1] < list[i])) {
    trap(name, list[i], i);
  }
}

// What is known of a block of the pool, in one word of scratch.
constexpr uint32_t kReadOnly = 1;
constexpr uint32_t kInTable = 2;

__global__ void __launch_bounds__(kThreads)
    clear_kernel(uint32_t* block_state, int64_t num_blocks) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block < num_blocks) block_state[block] = 0;
}

__global__ void __launch_bounds__(kThreads)
    read_only_kernel(const __grid_constant__ BlockList read_only_blocks, uint32_t* block_state,
                     int64_t num_blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= read_only_blocks.count) return;
  const int64_t block = read_only_blocks.blocks[i];
  if (block >= 0 && block < num_blocks) atomicOr(&block_state[block], kReadOnly);
}

// One block for each sequence.
__global__ void __launch_bounds__(kThreads)
    check_kernel(const __grid_constant__ Compaction c, uint32_t* block_state) {
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
    trap("keep_indices: expected %lld rows (cu_kept), got %lld", c.cu_kept[c.batch], c.num_indices);
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
      const uint32_t before = atomicOr(&block_state[entry], kInTable);
      if (before == kInTable) {
        trap(
            "block_table: expected every block once, or named in read_only_blocks, got block %lld "
            "again at [%lld, %lld]",
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
  if (c.placement != Placement::kPaged || rows.dropped() == 0) return;
  __syncthreads();  // the rows that are looked up now have been checked
  const int32_t pages = pages_of(c, rows.new_total());
  for (int32_t layer = 0; layer < c.index_layers; ++layer) {
    for (int32_t head = 0; head < c.index_heads; ++head) {
      const int64_t index = index_of(c, layer, head);
      for (int32_t page = threadIdx.x; page < pages; page += kThreads) {
        if (!page_is_written(c, rows, index, page)) continue;
        const int64_t block = page_block(c, rows, index, b, page);
        if ((atomicOr(&block_state[block], 0) & kReadOnly) != 0) {
          trap(
              "read_only_blocks: expected no move into block %lld, but sequence %lld would write "
              "to it",
              block, b);
        }
      }
    }
  }
}

}  // namespace

void compact(const CacheMoves& moves, Stream stream) {
  if (moves.tensors.size() <= kFewTasks) {
    return launch_compact<kFewTasks>(moves, moves.tensors, moves.outputs, stream);
  }
  CompactionOutputs outputs = moves.outputs;
  for (auto tensors = moves.tensors; !tensors.empty(); tensors = after(tensors, kManyTasks)) {
    launch_compact<kManyTasks>(moves, up_to(tensors, kManyTasks), outputs, stream);
    outputs = {};  // the first launch has written them
  }
}

void check_compaction(const Compaction& compaction, const BlockList& read_only_blocks,
                      uint32_t* block_state, Stream stream) {
  const auto blocks_for = [](int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  if (compaction.placement == Placement::kPaged) {
    const int64_t num_blocks = compaction.num_blocks;
    launch(clear_kernel, blocks_for(num_blocks), kThreads, 0, stream, block_state, num_blocks);
    launch(read_only_kernel, blocks_for(read_only_blocks.count), kThreads, 0, stream,
           read_only_blocks, block_state, num_blocks);
  }
  launch(check_kernel, compaction.batch, kThreads, 0, stream, compaction, block_state);
}

}  // namespace adsc::cuda
