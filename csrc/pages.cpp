#include "pages.h"

#include <algorithm>

#include "text.h"

namespace adsc {
namespace {

// What is known of a block.
enum BlockState : uint8_t { kReadOnly = 1, kInTable = 2, kStays = 4 };

std::vector<uint8_t> states_of(const PagedCache& cache) {
  const BlockList& read_only = cache.read_only_blocks;
  std::vector<uint8_t> states(cache.compaction.num_blocks);
  for (int64_t i = 0; i < read_only.count; ++i) {
    const int64_t block = read_only.blocks[i];
    if (block >= 0 && block < cache.compaction.num_blocks) states[block] |= kReadOnly;
  }
  return states;
}

int64_t old_block(const Compaction& c, int32_t b, int32_t page) {
  return c.table[b * c.table_stride + page];
}

int64_t times_in_table(const Compaction& c, int64_t block) {
  int64_t times = 0;
  for (int32_t b = 0; b < c.batch; ++b) {
    const int32_t pages = pages_of(c, sequence_rows(c, b).total);
    for (int32_t page = 0; page < pages; ++page) times += old_block(c, b, page) == block;
  }
  return times;
}

std::string find_table_fault(const PagedCache& cache, std::vector<uint8_t>& states) {
  const Compaction& c = cache.compaction;
  for (int32_t b = 0; b < c.batch; ++b) {
    const int32_t pages = pages_of(c, sequence_rows(c, b).total);
    for (int32_t page = 0; page < pages; ++page) {
      const int64_t block = old_block(c, b, page);
      if (block < 0 || block >= c.num_blocks) {
        return join(cache.table_name, ": expected blocks in [0, ", c.num_blocks, "), got ", block,
                    " at [", b, ", ", page, "]");
      }
      if (states[block] == kInTable) {
        return join(cache.table_name,
                    ": expected every block once, or named in read_only_blocks, got block ", block,
                    " ", times_in_table(c, block), " times, again at [", b, ", ", page, "]");
      }
      states[block] |= kInTable;
    }
  }
  return "";
}

// Calls visit(block) with each block of sequence b that a move writes, or may write. index: of the
// rows that stay.
template <class Visit>
void for_each_written(const PagedCache& cache, int32_t b, int64_t index, const Visit& visit) {
  const Compaction& c = cache.compaction;
  const SequenceRows rows = sequence_rows(c, b);
  if (rows.dropped() == 0) return;
  const int32_t pages = pages_of(c, rows.new_total());
  if (cache.rows_known) {
    for (int32_t page = 0; page < pages; ++page) {
      if (page_is_written(c, rows, index, page)) visit(page_block(c, rows, index, b, page));
    }
    return;
  }
  const auto first = static_cast<int32_t>(rows.prefix / c.num_tokens);
  if (first >= pages) return;
  const int32_t end = c.edit_table ? pages_of(c, rows.total) : pages;
  for (int32_t page = first; page < end; ++page) visit(old_block(c, b, page));
}

}  // namespace

std::string find_page_fault(const PagedCache& cache) {
  const Compaction& c = cache.compaction;
  std::vector<uint8_t> states = states_of(cache);
  std::string fault = find_table_fault(cache, states);
  if (!fault.empty() || cache.read_only_blocks.count == 0) return fault;
  const int64_t selections = cache.rows_known ? int64_t{c.index_layers} * c.index_heads : 1;
  for (int32_t b = 0; b < c.batch; ++b) {
    for (int64_t s = 0; s < selections; ++s) {
      for_each_written(cache, b, s * c.num_indices, [&](int64_t block) {
        if (fault.empty() && (states[block] & kReadOnly) != 0) {
          fault = join("read_only_blocks: expected no move into block ", block, ", but sequence ",
                       b, " would write to it");
        }
      });
      if (!fault.empty()) return fault;
    }
  }
  return "";
}

LeftOverBlocks find_left_over_blocks(const PagedCache& cache) {
  const Compaction& c = cache.compaction;
  std::vector<uint8_t> states = states_of(cache);
  LeftOverBlocks left;
  for (int32_t b = 0; b < c.batch; ++b) {
    const SequenceRows rows = sequence_rows(c, b);
    std::vector<bool> stays(pages_of(c, rows.total));
    for (int32_t page = 0; page < pages_of(c, rows.new_total()); ++page) {
      stays[place_of(c, rows, 0, page * static_cast<int32_t>(c.num_tokens)) / c.num_tokens] = true;
    }
    std::vector<int64_t>& released = left.released.emplace_back();
    for (int32_t page = 0; page < static_cast<int32_t>(stays.size()); ++page) {
      const int64_t block = old_block(c, b, page);
      if (stays[page]) {
        states[block] |= kStays;
      } else {
        released.push_back(block);
      }
    }
  }
  for (const std::vector<int64_t>& released : left.released) {
    for (const int64_t block : released) {
      if ((states[block] & (kStays | kReadOnly)) == 0) left.free.push_back(block);
      states[block] |= kStays;  // named once
    }
  }
  std::sort(left.free.begin(), left.free.end());
  return left;
}

}  // namespace adsc
