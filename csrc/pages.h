// The page rule on the host: what a block table forbids, and which blocks a compaction leaves over.
// For compact_paged_kv_ and compress_step on the CPU, and for Python, which tells an engine. No
// torch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "compaction.h"

namespace adsc {

// A paged cache whose lengths and table the host can read.
struct PagedCache {
  Compaction compaction{};
  BlockList read_only_blocks{};
  // False: only lengths are known, and any page behind the prefix may be written.
  bool rows_known = true;
  const char* table_name = "block_table";  // in messages
};

// In words, empty when there is nothing: a block outside the pool, one that two pages share and
// that isn't read-only, or a read-only one that a move would write.
std::string find_page_fault(const PagedCache& cache);

struct LeftOverBlocks {
  // By sequence, the blocks that it had and no longer uses, in the order of the table.
  std::vector<std::vector<int64_t>> released;
  // Those of them that no sequence uses and that aren't read-only, each once, rising.
  std::vector<int64_t> free;
};

// Of a cache without faults. With edit_table the rows must be known.
LeftOverBlocks find_left_over_blocks(const PagedCache& cache);

}  // namespace adsc
