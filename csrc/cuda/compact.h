// Compacting a KV cache in place.
#pragma once

#include "../compaction.h"
#include "stream.h"

namespace adsc::cuda {

// Moves the rows of `count` tensors and writes the outputs, if there are any: one launch for up to 512
// tensors.
void compact(const Compaction& compaction, const CacheTensor* tensors, int count,
             const CompactionOutputs& outputs, Stream stream);

// ADSC_CHECK=1: looks at every length, row and block, and ends the stream's work with a message where
// one points outside.
void check_compaction(const Compaction& compaction, Stream stream);

}  // namespace adsc::cuda
