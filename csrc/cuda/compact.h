// compact_kv_ and compact_paged_kv_: compacting a KV cache in place.
#pragma once

#include <span>

#include "../compaction.h"
#include "stream.h"

namespace adsc::cuda {

struct CacheMoves {
  Compaction compaction{};
  std::span<const CacheTensor> tensors{};
  CompactionOutputs outputs{};
};

// Moves the rows of the tensors and writes the outputs, if there are any: one launch for up to 512
// tensors.
void compact(const CacheMoves& moves, Stream stream);

// Looks at every length, row and block, and ends the stream's work with a message where one points
// outside, where rows don't rise, where two pages of a table share a block that isn't read-only,
// and where a move would write one that is. block_state: scratch, one for each block of a paged
// cache.
void check_compaction(const Compaction& compaction, const BlockList& read_only_blocks,
                      uint32_t* block_state, Stream stream);

}  // namespace adsc::cuda
