// What a boundary does to the rows, by one block of threads: its tile of the norm or of a copy, or
// the metadata.
#pragma once

#include <type_traits>

#include "boundary_step.h"
#include "copy.cuh"
#include "layout.cuh"
#include "norm.cuh"

namespace adsc::cuda {

// What one launch does. The first block writes the metadata, if there is a layout; the next norm
// rows; the rest copy. None waits for another: with a layout, each scans it for its own rows.
struct BoundaryWork {
  RowMap map;
  LayoutStep step;
  bool has_layout;
  bool writes_metadata;
  RowNorm norm;
  NormShape shape;
  CopyTasks copies;

  ADSC_HOST_DEVICE int64_t num_blocks() const {
    return writes_metadata + shape.num_tiles + copies.num_tiles;
  }
};

// copies: at most kMaxCopies. opens: the launch that does more than copy. least_threads: of a
// block.
inline BoundaryWork boundary_work(const RowMap& map, const LayoutStep* layout, const RowNorm* norm,
                                  const RowCopy* copies, int count, bool opens,
                                  int least_threads = 128) {
  BoundaryWork work{};
  work.map = map;
  work.has_layout = layout != nullptr;
  if (work.has_layout) work.step = *layout;
  work.writes_metadata = work.has_layout && opens;
  if (norm != nullptr && opens) {
    work.norm = *norm;
    work.shape = norm_shape(*norm, map.num_tokens, least_threads);
  }
  if (work.shape.threads == 0) work.shape.threads = kThreads;
  work.copies = copy_tasks(copies, count, map.num_tokens, work.shape.threads);
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
    write_metadata(work.step.layout, work.step.boundary, work.step.stage, space.scan.warp_sums);
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
