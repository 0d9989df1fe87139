// compact_kv_, compact_paged_kv_ and compress_step: compacting a KV cache in place.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../compaction.h"

namespace adsc::cpu {

// What is wrong with the contents of the lists and tables, in words; empty when nothing is.
std::string find_fault(const Compaction& compaction, const BlockList& read_only_blocks);

// Rows of one sequence that move together: places that follow one another on either side.
struct Run {
  Place to;
  Place from;
  int64_t count;
};

// The moves of sequence b, in the order of move_at; rows in their place already are left out.
// index: index_of the head.
std::vector<Run> find_runs(const Compaction& compaction, int32_t b, int64_t index);

// Moves bytes [begin, end) of the lines that begin at `base`.
void move_runs(const std::vector<Run>& runs, const CacheTensor& tensor, std::byte* base,
               int64_t begin, int64_t end);

void write_outputs(const Compaction& compaction, const CompactionOutputs& outputs);

}  // namespace adsc::cpu
