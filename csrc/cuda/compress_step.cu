#include "boundary_step.cuh"
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
template <class T, class Access>
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
    boundary_block<T, Access>(work, block - first, space.boundary);
  }
}

}  // namespace

void compress_step(const RowMap& map, const LayoutStep* layout, const RowNorm* norm,
                   const RowCopy* copies, int num_copies, const Compaction& compaction,
                   const CacheTensor* tensors, int num_tensors, const CompactionOutputs& outputs,
                   Stream stream) {
  const int moved = num_copies < kMaxCopies ? num_copies : kMaxCopies;
  const BoundaryWork work = boundary_work(map, layout, norm, copies, moved, true, kThreads);
  const int compacted = num_tensors < kTasks ? num_tensors : kTasks;
  const auto tasks = strip_tasks<kTasks>(compaction, tensors, compacted);
  const int64_t blocks = work.num_blocks() + tasks.num_blocks + output_blocks(compaction, outputs);
  with_norm_types(work, [&]<class T, class Access>() {
    launch(compress_step_kernel<T, Access>, blocks, kThreads, 0, stream, work, compaction, outputs,
           tasks);
  });
  boundary_copies(map, layout, copies + moved, num_copies - moved, stream);
  if (num_tensors > compacted) {
    compact(compaction, tensors + compacted, num_tensors - compacted, CompactionOutputs{}, stream);
  }
}

}  // namespace adsc::cuda
