#include "boundary_step.cuh"
#include "chunks.h"
#include "launch.h"

namespace adsc::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    boundary_step_kernel(const __grid_constant__ BoundaryWork work) {
  __shared__ BoundarySpace<T> space;
  boundary_block<T>(work, blockIdx.x, space);
}

void launch_work(const BoundaryWork& work, Stream stream) {
  with_norm_type(work, [&]<class T>() {
    launch(boundary_step_kernel<T>, work.num_blocks(), work.shape.threads, 0, stream, work);
  });
}

}  // namespace

void boundary_step(const BoundaryMoves& moves, Stream stream) {
  const BoundaryMoves fused = launch_unfused(moves, stream);
  launch_work(opening_work(fused), stream);
  boundary_copies(fused, stream);
}

void boundary_copies(const BoundaryMoves& moves, Stream stream) {
  for (auto copies = after(moves.copies, kMaxCopies); !copies.empty();
       copies = after(copies, kMaxCopies)) {
    launch_work(copying_work(moves, up_to(copies, kMaxCopies), kThreads), stream);
  }
}

}  // namespace adsc::cuda
