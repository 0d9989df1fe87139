#include "downsample_add_rms_norm.h"
#include "launch.h"
#include "norm.cuh"

namespace adsc::cuda {
namespace {

template <class T, class Access>
__global__ void __launch_bounds__(kThreads, 2)
    downsample_add_rms_norm_kernel(const __grid_constant__ RowMap map,
                                   const __grid_constant__ RowNorm norm, int group, int tile_rows) {
  using Compute = decltype(widen(T{}));
  __shared__ Compute partial[kThreads / kWarp];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile_rows;
  const int64_t left = map.num_tokens - begin;
  const int count = static_cast<int>(left < tile_rows ? left : tile_rows);
  const int row = row_of_group(group);
  const int64_t source = row < count ? find_row(map, begin + row) : kNoRow;
  norm_tile<T, Access, Compute>(norm, group, begin, count, source, partial);
}

}  // namespace

void add_rms_norm_rows(const RowMap& map, const RowNorm& norm, Stream stream) {
  const NormShape shape = norm_shape(norm, map.num_tokens);
  with_element_types(norm.element, shape.wide, [&]<class T, class Access>(T, Access) {
    launch(downsample_add_rms_norm_kernel<T, Access>, shape.num_tiles, shape.threads, 0, stream,
           map, norm, shape.group, shape.tile_rows);
  });
}

}  // namespace adsc::cuda
