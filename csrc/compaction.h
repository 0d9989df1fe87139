// What a compaction of a KV cache moves, for a CPU and a GPU alike. No torch: pointers and strides.
//
// A sequence's cached rows are `prefix | rows to choose from | suffix`; of the middle some stay,
// and the new cache is prefix, those, suffix, without gaps. Row numbers count within a sequence.
#pragma once

#include <cstddef>
#include <cstdint>

#include "segment.h"

namespace adsc {

// K, V or scales of one layer. A token is `num_lines` lines of contiguous bytes: one for each head,
// or a single one where the heads lie behind one another. Strides in bytes.
struct CacheTensor {
  std::byte* base;
  int64_t block_stride;  // from block to block, or from sequence to sequence of a batched cache
  int64_t token_stride;
  int64_t line_stride;
  int32_t line_bytes;
  int32_t num_lines;
  int32_t layer;
};

// int32 or int64 values; no data: there are none.
struct IntList {
  const void* data = nullptr;
  bool wide = false;

  ADSC_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

enum class Placement : int32_t {
  kPacked,   // row r of sequence b is token seq_starts[b] + r
  kBatched,  // token r of block b
  kPaged     // token r % block_size of block table[b, r / block_size]
};

struct Compaction {
  int32_t batch = 0;
  // The rows that stay: of a stage, or given.
  bool by_segments = false;
  const Segment* segments = nullptr;
  int32_t num_segments = 0;
  IntList indices;  // [index_layers, index_heads, num_indices]: counted from the first row to
                    // choose from, rising within a sequence; a single layer or head serves all
  int32_t index_layers = 1;
  int32_t index_heads = 1;
  int64_t num_indices = 0;
  IntList cu_kept;      // [batch + 1]
  IntList cu_rows;      // [batch + 1], or none: all rows behind the prefix
  IntList prefix_lens;  // [batch], or none: 0
  IntList seq_lens;     // [batch], or none: no suffix
  // Where they lie.
  Placement placement = Placement::kPacked;
  IntList seq_starts;  // [batch + 1]
  IntList table;       // [batch, table_width]
  int64_t table_stride = 0;
  int64_t table_width = 0;
  int64_t num_blocks = 0;  // of the pool, or of a batched cache; else 1
  int64_t num_tokens = 0;  // of a block
  bool edit_table = false;
};

// Blocks of a paged cache: any values, in any order.
struct BlockList {
  IntList blocks;
  int64_t count = 0;
};

// Where what is reported goes; null: it isn't asked for.
struct CompactionOutputs {
  int32_t* seq_lens = nullptr;       // [batch]
  int64_t* slots = nullptr;          // [batch]
  int32_t* last_page_len = nullptr;  // [batch]
  int32_t* indptr = nullptr;         // [batch + 1]
  void* table = nullptr;             // [batch, table_width], of the old one's width
};

struct SequenceRows {
  int32_t prefix;
  int32_t source;  // rows to choose from
  int32_t kept;
  int32_t total;
  int32_t first_kept;  // number of the first of them in segments and indices
  int32_t first_row;   // what segments or indices call the first row to choose from

  ADSC_HOST_DEVICE int32_t dropped() const { return source - kept; }
  ADSC_HOST_DEVICE int32_t new_total() const { return total - dropped(); }
};

ADSC_HOST_DEVICE SequenceRows sequence_rows(const Compaction& c, int32_t b) {
  SequenceRows rows{};
  rows.prefix = c.prefix_lens.data == nullptr ? 0 : static_cast<int32_t>(c.prefix_lens[b]);
  rows.first_kept = static_cast<int32_t>(c.cu_kept[b]);
  rows.kept = static_cast<int32_t>(c.cu_kept[b + 1]) - rows.first_kept;
  if (c.cu_rows.data == nullptr) {
    rows.total = static_cast<int32_t>(c.seq_lens[b]);
    rows.source = rows.total - rows.prefix;
  } else {
    const auto first = static_cast<int32_t>(c.cu_rows[b]);
    rows.source = static_cast<int32_t>(c.cu_rows[b + 1]) - first;
    rows.first_row = c.by_segments ? first : 0;
    rows.total = c.seq_lens.data == nullptr ? rows.prefix + rows.source
                                            : static_cast<int32_t>(c.seq_lens[b]);
  }
  return rows;
}

// Where the indices of a layer's head begin.
ADSC_HOST_DEVICE int64_t index_of(const Compaction& c, int32_t layer, int32_t head) {
  const int64_t row = c.index_layers > 1 ? layer : 0;
  return (row * c.index_heads + (c.index_heads > 1 ? head : 0)) * c.num_indices;
}

// The old row that row `row` of the new cache takes. index: index_of the head.
ADSC_HOST_DEVICE int32_t source_of(const Compaction& c, const SequenceRows& rows, int64_t index,
                                   int32_t row) {
  const int32_t kept = row - rows.prefix;
  if (kept < 0) return row;
  if (kept >= rows.kept) return row + rows.dropped();
  const int64_t number = int64_t{rows.first_kept} + kept;
  if (!c.by_segments) return rows.prefix + static_cast<int32_t>(c.indices[index + number]);
  const Segment& segment = c.segments[find_segment(c.segments, c.num_segments, number)];
  return rows.prefix + static_cast<int32_t>(source_row(segment, number)) - rows.first_row;
}

// With edit_table: a page of the new cache, its rows, and the page of the old one whose block it
// takes.
struct Page {
  int32_t first, last;
  int32_t home;
  bool backwards;  // rows move to later places
};

// A page takes the block of its last row if that lies right in it: text behind a picture that lost
// whole blocks then stays where it is. Else the block of its first row.
//
// Homes rise from page to page. The sources of two pages' first rows are at least `size` apart. A
// page that takes its last row's block and isn't the last of all ends with the last place of that
// block, so later rows have sources in later blocks; and its first row's source is no later than
// that.
//
// Backwards: place(row) = source(last) - (last - row) >= source(row), since sources rise. What lies
// at the places from place(first) to place(last) is needed by no row but the page's own: a row with
// a source there is at most `last`, and at most last - first rows in front of it. Otherwise:
// place(row) = home * size + (row - first) <= source(first) + (row - first) <= source(row).
ADSC_HOST_DEVICE Page page_of(const Compaction& c, const SequenceRows& rows, int64_t index,
                              int32_t row) {
  const auto size = static_cast<int32_t>(c.num_tokens);
  Page page{};
  page.first = row / size * size;
  const int32_t rest = rows.new_total() - page.first;
  page.last = page.first + (rest < size ? rest : size) - 1;
  const int32_t source = source_of(c, rows, index, page.last);
  page.backwards = source % size == page.last % size;
  page.home = (page.backwards ? source : source_of(c, rows, index, page.first)) / size;
  return page;
}

// The old row in whose place row `row` of the new cache is put.
ADSC_HOST_DEVICE int32_t place_of(const Compaction& c, const SequenceRows& rows, int64_t index,
                                  int32_t row) {
  if (!c.edit_table) return row;
  const Page page = page_of(c, rows, index, row);
  return page.home * static_cast<int32_t>(c.num_tokens) + (row - page.first);
}

struct RowMove {
  int32_t from, to;  // old rows: the one that is taken, and the one in whose place it is put
};

// The move that comes at `position`, in an order in which a row is read before its place is:
// rising, and falling inside of a page whose rows move backwards. page: the position's own; taken
// only where the table is edited.
ADSC_HOST_DEVICE RowMove move_in_page(const Compaction& c, const SequenceRows& rows, int64_t index,
                                      const Page& page, int32_t position) {
  int32_t row = position;
  int32_t to = position;
  if (c.edit_table) {
    if (page.backwards) row = page.first + (page.last - position);
    to = page.home * static_cast<int32_t>(c.num_tokens) + (row - page.first);
  }
  return {source_of(c, rows, index, row), to};
}

ADSC_HOST_DEVICE RowMove move_at(const Compaction& c, const SequenceRows& rows, int64_t index,
                                 int32_t position) {
  Page page{};
  if (c.edit_table) page = page_of(c, rows, index, position);
  return move_in_page(c, rows, index, page, position);
}

// Whether a row is moved into page `page` of the new cache. A row's distance to its source never
// falls within a sequence: if the first and the last row of a page are in their places, all are.
ADSC_HOST_DEVICE bool page_is_written(const Compaction& c, const SequenceRows& rows, int64_t index,
                                      int32_t page) {
  const int64_t end = (int64_t{page} + 1) * c.num_tokens;
  const auto first = static_cast<int32_t>(page * c.num_tokens);
  const int32_t last = (end < rows.new_total() ? static_cast<int32_t>(end) : rows.new_total()) - 1;
  return source_of(c, rows, index, first) != place_of(c, rows, index, first) ||
         source_of(c, rows, index, last) != place_of(c, rows, index, last);
}

struct Place {
  int64_t block;
  int64_t token;
};

// Where an old row of sequence b lies.
ADSC_HOST_DEVICE Place place_in_cache(const Compaction& c, int32_t b, int32_t row) {
  if (c.placement == Placement::kPacked) return {0, c.seq_starts[b] + row};
  if (c.placement == Placement::kBatched) return {b, row};
  const auto size = static_cast<int32_t>(c.num_tokens);
  return {c.table[b * c.table_stride + row / size], row % size};
}

template <class Tensor>
ADSC_HOST_DEVICE int64_t offset_in(const Tensor& tensor, const Place& place) {
  return place.block * tensor.block_stride + place.token * tensor.token_stride;
}

ADSC_HOST_DEVICE int32_t pages_of(const Compaction& c, int32_t length) {
  const auto size = static_cast<int32_t>(c.num_tokens);
  return (length + size - 1) / size;
}

// The slot of the token that comes next, -1 where there is no room or a block is needed.
ADSC_HOST_DEVICE int64_t next_slot(const Compaction& c, const SequenceRows& rows, int32_t b) {
  const int32_t length = rows.new_total();
  if (c.placement == Placement::kPacked) {
    const int64_t slot = c.seq_starts[b] + length;
    return slot < c.seq_starts[b + 1] ? slot : -1;
  }
  if (c.placement == Placement::kBatched) {
    return length < c.num_tokens ? b * c.num_tokens + length : -1;
  }
  const auto size = static_cast<int32_t>(c.num_tokens);
  if (length % size == 0) return -1;
  const Place last = place_in_cache(c, b, place_of(c, rows, 0, length - 1));
  return last.block * size + last.token + 1;
}

// The block of page `page` of the new cache.
ADSC_HOST_DEVICE int64_t page_block(const Compaction& c, const SequenceRows& rows, int64_t index,
                                    int32_t b, int32_t page) {
  const auto size = static_cast<int32_t>(c.num_tokens);
  return place_in_cache(c, b, place_of(c, rows, index, page * size)).block;
}

// Entry `page` of the new table.
ADSC_HOST_DEVICE int64_t table_entry(const Compaction& c, const SequenceRows& rows, int32_t b,
                                     int32_t page) {
  return page < pages_of(c, rows.new_total()) ? page_block(c, rows, 0, b, page) : -1;
}

// Rows in the last block of `length` rows; 0 for none.
ADSC_HOST_DEVICE int32_t last_page_len(const Compaction& c, int32_t length) {
  const auto size = static_cast<int32_t>(c.num_tokens);
  return length == 0 ? 0 : (length - 1) % size + 1;
}

ADSC_HOST_DEVICE void set_table_entry(const Compaction& c, const CompactionOutputs& out, int32_t b,
                                      int32_t page, int64_t block) {
  const int64_t i = b * c.table_width + page;
  if (c.table.wide) {
    static_cast<int64_t*>(out.table)[i] = block;
  } else {
    static_cast<int32_t*>(out.table)[i] = static_cast<int32_t>(block);
  }
}

}  // namespace adsc
