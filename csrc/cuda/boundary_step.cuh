// What boundary_step and compress_step do to the rows, by one block of threads: its tile of the
// norm or of a copy, or the metadata.
#pragma once

#include <type_traits>

#include "boundary_step.h"
#include "chunks.h"
#include "copy.cuh"
#include "downsample_add_rms_norm.h"
#include "metadata.cuh"
#include "norm.cuh"
#include "rebuild_metadata.h"

namespace adsc::cuda {

// What one launch does. The first block writes the metadata, if there is a layout; the next norm
// rows; the rest copy. None waits for another: with a layout, each scans it for its own rows.
struct BoundaryWork {
  RowMap map;
  MetadataStep step;
  bool has_layout;
  bool writes_metadata;
  RowNorm norm;
  NormShape shape;
  CopyTasks copies;

  ADSC_HOST_DEVICE int64_t num_blocks() const {
    return writes_metadata + shape.num_tiles + copies.num_tiles;
  }
};

// A launch that only copies. copies: at most kMaxCopies. threads: of a block.
inline BoundaryWork copying_work(const BoundaryMoves& moves, std::span<const RowCopy> copies,
                                 int threads) {
  BoundaryWork work{};
  work.map = moves.map;
  work.has_layout = moves.metadata != nullptr;
  if (work.has_layout) work.step = *moves.metadata;
  work.shape.threads = threads;
  work.copies = copy_tasks(copies, moves.map.num_tokens, threads);
  return work;
}

// The first launch: all but the copies past kMaxCopies. threads: of a block; 0: as fit the norm.
inline BoundaryWork opening_work(const BoundaryMoves& moves, int threads = 0) {
  NormShape shape{};
  if (moves.norm != nullptr) shape = norm_shape(*moves.norm, moves.map.num_tokens, threads);
  if (shape.threads == 0) shape.threads = kThreads;
  BoundaryWork work = copying_work(moves, up_to(moves.copies, kMaxCopies), shape.threads);
  work.writes_metadata = work.has_layout;
  if (moves.norm != nullptr) work.norm = *moves.norm;
  work.shape = shape;
  return work;
}

// Whether one launch norms rows and does the rest: numbers of 16 or 32 bits in accesses of 16
// bytes. nvcc compiles the kernels once for each type that they norm, so the seldom ones are left
// to downsample_add_rms_norm's.
inline bool is_fused(const RowNorm& norm) {
  return norm.element != Element::kDouble && is_wide(norm);
}

// Launches what of a boundary its own kernel does not do, by other ops', and returns the rest.
inline BoundaryMoves launch_unfused(BoundaryMoves moves, Stream stream) {
  const bool norms_apart = moves.norm != nullptr && !is_fused(*moves.norm);
  // In a long layout every block would read all spans; a table is looked up at any length.
  if (moves.metadata != nullptr && (norms_apart || !scans_once(moves.metadata->layout))) {
    rebuild_metadata(*moves.metadata, stream);
    moves.map.segments = moves.metadata->stage.segments;
    moves.map.num_segments = static_cast<int32_t>(num_segments(*moves.metadata));
    moves.metadata = nullptr;
  }
  if (norms_apart) {
    add_rms_norm_rows(moves.map, *moves.norm, stream);
    moves.norm = nullptr;
  }
  return moves;
}

// What a block shares. T: the element of the norm; void: nothing to norm.
template <class T>
struct BoundarySpace {
  int64_t rows[kTileRows];
  ScanSpace scan;
  decltype(widen(T{})) partial[kThreads / kWarp];
};
template <>
struct BoundarySpace<void> {
  int64_t rows[kTileRows];
  ScanSpace scan;
};

// What block `number` of num_blocks() does.
template <class T>
__device__ __forceinline__ void boundary_block(const BoundaryWork& work, int64_t number,
                                               BoundarySpace<T>& space) {
  if (work.writes_metadata && number-- == 0) {
    const int32_t longest =
        write_metadata(work.step, whole(work.step.layout), space.scan.warp_sums);
    if (threadIdx.x == 0) *work.step.stage.max_seqlen = longest;
    return;
  }
  const bool norms = number < work.shape.num_tiles;
  int64_t begin;
  int count;
  const CopyTask* task = nullptr;
  Tile tile;
  if (norms) {
    begin = number * work.shape.tile_rows;
    const int64_t left = work.map.num_tokens - begin;
    count = static_cast<int>(left < work.shape.tile_rows ? left : work.shape.tile_rows);
  } else {
    number -= work.shape.num_tiles;
    task = &task_of(work.copies, number);
    tile = tile_of(*task, number, work.map.num_tokens);
    begin = tile.begin;
    count = tile.count;
  }
  if (work.has_layout) {
    find_rows(work.step.layout, work.step.boundary, begin, count, space.rows, space.scan);
  } else if (!norms) {
    find_rows(work.map, begin, count, space.rows);
  }
  if constexpr (!std::is_void_v<T>) {
    if (norms) {
      const int row = row_of_group(work.shape.group);
      int64_t source = kNoRow;
      if (row < count) {
        source = work.has_layout ? space.rows[row] : find_row(work.map, begin + row);
      }
      norm_tile<T, uint4>(work.norm, work.shape.group, begin, count, source, space.partial);
      return;
    }
  }
  copy_tile(*task, tile, space.rows);
}

// Calls body<T>() with the element of the norm that the work holds; void: none.
template <class Body>
void with_norm_type(const BoundaryWork& work, const Body& body) {
  if (work.shape.num_tiles == 0) return body.template operator()<void>();
  switch (work.norm.element) {
    case Element::kBFloat16:
      return body.template operator()<BFloat16>();
    case Element::kHalf:
      return body.template operator()<Half>();
    default:
      return body.template operator()<float>();
  }
}

}  // namespace adsc::cuda
