// compress_step: a boundary's step and the compaction of caches that were written before it, in one
// launch.
#pragma once

#include "boundary_step.h"
#include "compact.h"

namespace adsc::cuda {

// Cache tensors past the 64th take launches of their own, and so does what does in boundary_step.
void compress_step(const BoundaryMoves& boundary, const CacheMoves& cache, Stream stream);

}  // namespace adsc::cuda
