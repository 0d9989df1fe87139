#include "boundary_step.cuh"
#include "chunks.h"
#include "compact.cuh"
#include "compress_step.h"
#include "launch.h"

namespace adsc::cuda {
namespace {

// Cache tensors of a launch: K and V of 32 layers. One size, since it is compiled for each type of
// the norm; together the parameters take 6 KiB.
constexpr int kTasks = 64;

// First the blocks of the compaction, whose walks over a sequence take longest, then those of the
// boundary; no block waits for another, and the two parts share no memory.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    compress_step_kernel(const __grid_constant__ BoundaryWork work,
                         const __grid_constant__ Compaction c,
                         const __grid_constant__ CompactionOutputs out,
                         const __grid_constant__ StripTasks<kTasks> tasks) {
  __shared__ union {
    BoundarySpace<T> boundary;
    CompactSpace compaction;
  } space;
  const int64_t block = blockIdx.x;
  const int64_t first = gridDim.x - work.num_blocks();  // of the boundary
  if (block < first) {
    compact_block(c, out, tasks, block, space.compaction);
  } else {
    boundary_block<T>(work, block - first, space.boundary);
  }
}

}  // namespace

void compress_step(const BoundaryMoves& boundary, const CacheMoves& cache, Stream stream) {
  const BoundaryMoves fused = launch_unfused(boundary, stream);
  const BoundaryWork work = opening_work(fused, kThreads);
  const auto tasks = strip_tasks<kTasks>(cache.compaction, up_to(cache.tensors, kTasks));
  const int64_t blocks =
      work.num_blocks() + tasks.num_blocks + output_blocks(cache.compaction, cache.outputs);
  with_norm_type(work, [&]<class T>() {
    launch(compress_step_kernel<T>, blocks, kThreads, 0, stream, work, cache.compaction,
           cache.outputs, tasks);
  });
  boundary_copies(fused, stream);
  if (const auto rest = after(cache.tensors, kTasks); !rest.empty()) {
    compact({.compaction = cache.compaction, .tensors = rest}, stream);
  }
}

}  // namespace adsc::cuda
