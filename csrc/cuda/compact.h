// Compacting a KV cache in place.
#pragma once

#include "../compaction.h"
#include "stream.h"

namespace adsc::cuda {

// Moves the rows of `count` tensors and writes the outputs, if there are any: one launch for up to
// 512 tensors.
void compact(const Compaction& compaction, const CacheTensor* tensors, int count,
             const CompactionOutputs& outputs, Stream stream);

// Looks at every length, row and block, and ends the stream's work with a message where one points
// outside, where rows don't rise, where two pages of a table share a block that isn't pinned, and
// where a move would write a pinned one. block_state: scratch, one for each block of a paged cache.
void check_compaction(const Compaction& compaction, const BlockList& pinned, uint32_t* block_state,
                      Stream stream);

}  // namespace adsc::cuda
