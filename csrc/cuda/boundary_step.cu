#include "boundary_step.cuh"
#include "launch.h"

namespace adsc::cuda {
namespace {

template <class T, class Access>
__global__ void __launch_bounds__(kThreads, 1)
    boundary_step_kernel(const __grid_constant__ BoundaryWork work) {
  __shared__ BoundarySpace<T> space;
  boundary_block<T, Access>(work, blockIdx.x, space);
}

void launch_work(const BoundaryWork& work, Stream stream) {
  with_norm_types(work, [&]<class T, class Access>() {
    launch(boundary_step_kernel<T, Access>, work.num_blocks(), work.shape.threads, 0, stream, work);
  });
}

}  // namespace

void boundary_step(const RowMap& map, const LayoutStep* layout, const RowNorm* norm,
                   const RowCopy* copies, int count, Stream stream) {
  const int first = count < kMaxCopies ? count : kMaxCopies;
  launch_work(boundary_work(map, layout, norm, copies, first, true), stream);
  boundary_copies(map, layout, copies + first, count - first, stream);
}

void boundary_copies(const RowMap& map, const LayoutStep* layout, const RowCopy* copies, int count,
                     Stream stream) {
  for (int first = 0; first < count; first += kMaxCopies) {
    const int some = count - first < kMaxCopies ? count - first : kMaxCopies;
    launch_work(boundary_work(map, layout, nullptr, copies + first, some, false), stream);
  }
}

}  // namespace adsc::cuda
