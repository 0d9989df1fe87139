#include "boundary_step.h"

#include <type_traits>

#include "copy.cuh"
#include "launch.h"
#include "layout.cuh"
#include "norm.cuh"

namespace adsc::cuda {
namespace {

// What one launch does. The first block writes the metadata, if there is a layout; the next norm
// rows; the rest copy. None waits for another: with a layout, each scans it for its own rows.
struct Work {
  RowMap map;
  LayoutStep step;
  bool has_layout;
  bool writes_metadata;
  RowNorm norm;
  NormShape shape;
  CopyTasks copies;
};

// T void: nothing to norm.
template <class T, class Access>
__global__ void __launch_bounds__(kThreads, 1)
    boundary_step_kernel(const __grid_constant__ Work work) {
  __shared__ int64_t rows[kTileRows];
  __shared__ ScanSpace space;
  int64_t number = blockIdx.x;
  if (work.writes_metadata && number-- == 0) {
    write_metadata(work.step.layout, work.step.boundary, work.step.stage, space.warp_sums);
    return;
  }
  const auto find = [&](int64_t begin, int count) {
    if (work.has_layout) {
      find_rows(work.step.layout, work.step.boundary, begin, count, rows, space);
    } else {
      find_rows(work.map, begin, count, rows);
    }
  };
  if constexpr (!std::is_void_v<T>) {
    if (number < work.shape.num_tiles) {
      using Compute = decltype(widen(T{}));
      __shared__ Compute partial[2][kThreads / kWarp];
      const int64_t begin = number * work.shape.tile_rows;
      const int64_t left = work.map.num_tokens - begin;
      const int count = static_cast<int>(left < work.shape.tile_rows ? left : work.shape.tile_rows);
      find(begin, count);
      norm_tile<T, Access, Compute>(work.norm, work.shape.group, begin, count, rows, partial);
      return;
    }
    number -= work.shape.num_tiles;
  }
  const CopyTask& task = task_of(work.copies, number);
  const Tile tile = tile_of(task, number, work.map.num_tokens);
  find(tile.begin, tile.count);
  copy_tile(task, tile, rows);
}

template <class T, class Access>
void launch_step(const Work& work, int threads, Stream stream) {
  launch(boundary_step_kernel<T, Access>,
         work.writes_metadata + work.shape.num_tiles + work.copies.num_tiles, threads, 0, stream,
         work);
}

}  // namespace

void boundary_step(const RowMap& map, const LayoutStep* layout, const RowNorm* norm,
                   const RowCopy* copies, int count, Stream stream) {
  for (int first = 0; first == 0 || first < count; first += kMaxCopies) {
    const int some = count - first < kMaxCopies ? count - first : kMaxCopies;
    const bool opens = first == 0;  // the launch that does more than copy
    Work work{};
    work.map = map;
    work.has_layout = layout != nullptr;
    if (work.has_layout) work.step = *layout;
    work.writes_metadata = work.has_layout && opens;
    if (norm != nullptr && opens) {
      work.norm = *norm;
      work.shape = norm_shape(*norm, map.num_tokens);
    }
    const int threads = work.shape.threads != 0 ? work.shape.threads : kThreads;
    work.copies = copy_tasks(copies + first, some, map.num_tokens, threads);
    if (work.shape.num_tiles == 0) {
      launch_step<void, void>(work, threads, stream);
    } else {
      with_element_types(norm->element, work.shape.wide, [&]<class T, class Access>(T, Access) {
        launch_step<T, Access>(work, threads, stream);
      });
    }
  }
}

}  // namespace adsc::cuda
