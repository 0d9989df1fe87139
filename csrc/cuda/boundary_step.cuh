// What boundary_step and compress_step do to the rows, by one block of threads: its tile of the
// norm or of a copy, or the metadata.
#pragma once

#include <type_traits>

#include "boundary_step.h"
#include "chunks.h"
#include "copy.cuh"
#include "metadata.cuh"
#include "norm.cuh"

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

// The first launch: all but the copies past kMaxCopies. least_threads: of a block.
inline BoundaryWork opening_work(const BoundaryMoves& moves, int least_threads = 128) {
  NormShape shape{};
  if (moves.norm != nullptr) shape = norm_shape(*moves.norm, moves.map.num_tokens, least_threads);
  if (shape.threads == 0) shape.threads = kThreads;
  BoundaryWork work = copying_work(moves, up_to(moves.copies, kMaxCopies), shape.threads);
  work.writes_metadata = work.has_layout;
  if (moves.norm != nullptr) work.norm = *moves.norm;
  work.shape = shape;
  return work;
}

// What a block shares. T: the element of the norm; void: nothing to norm.
template <class T>
struct BoundarySpace {
  int64_t rows[kTileRows];
  ScanSpace scan;
  decltype(widen(T{})) partial[2][kThreads / kWarp];
};
template <>
struct BoundarySpace<void> {
  int64_t rows[kTileRows];
  ScanSpace scan;
};

// What block `number` of num_blocks() does.
template <class T, class Access>
__device__ __forceinline__ void boundary_block(const BoundaryWork& work, int64_t number,
                                               BoundarySpace<T>& space) {
  if (work.writes_metadata && number-- == 0) {
    write_metadata(work.step, space.scan.warp_sums);
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
  } else {
    find_rows(work.map, begin, count, space.rows);
  }
  if constexpr (!std::is_void_v<T>) {
    if (norms) {
      norm_tile<T, Access>(work.norm, work.shape.group, begin, count, space.rows, space.partial);
      return;
    }
  }
  copy_tile(*task, tile, space.rows);
}

// Calls body<T, Access>() with what boundary_block takes.
template <class Body>
void with_norm_types(const BoundaryWork& work, const Body& body) {
  if (work.shape.num_tiles == 0) {
    body.template operator()<void, void>();
  } else {
    with_element_types(work.norm.element, work.shape.wide, [&]<class T, class Access>(T, Access) {
      body.template operator()<T, Access>();
    });
  }
}

}  // namespace adsc::cuda
