// A boundary's step and the compaction of caches that were written before it, in one launch.
#pragma once

#include "boundary_step.h"
#include "compact.h"

namespace adsc::cuda {

// Arguments as for boundary_step and compact. One launch, unless there are more than 16 copies or
// 64 cache tensors: those beyond take launches of their own.
void compress_step(const RowMap& map, const LayoutStep* layout, const RowNorm* norm,
                   const RowCopy* copies, int num_copies, const Compaction& compaction,
                   const CacheTensor* tensors, int num_tensors, const CompactionOutputs& outputs,
                   Stream stream);

}  // namespace adsc::cuda
