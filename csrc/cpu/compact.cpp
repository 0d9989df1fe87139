#include "compact.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "../pages.h"
#include "../text.h"
#include "copy.h"
#include "rows.h"

namespace adsc::cpu {
namespace {

constexpr size_t kRunsAhead = 8;
constexpr int64_t kBytesAhead = 512;
constexpr int64_t kCacheLine = 64;

RowMap rows_that_stay(const Compaction& c, int64_t index) {
  RowMap map;
  map.num_tokens = c.cu_kept[c.batch];
  map.num_rows = c.cu_rows.data == nullptr ? 0 : c.cu_rows[c.batch];
  map.segments = c.segments;
  map.num_segments = c.num_segments;
  if (c.indices.wide) {
    map.indices64 = static_cast<const int64_t*>(c.indices.data) + index;
  } else if (c.indices.data != nullptr) {
    map.indices32 = static_cast<const int32_t*>(c.indices.data) + index;
  }
  return map;
}

std::string find_length_fault(const Compaction& c, int32_t b) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  for (const auto& [list, name] : {std::pair{c.cu_kept, "cu_kept"}, std::pair{c.cu_rows, "cu_rows"},
                                   std::pair{c.seq_starts, "seq_starts"}}) {
    if (list.data != nullptr && list[b + 1] < list[b]) {
      return join(name, ": expected rising boundaries, got ", list[b + 1], " behind ", list[b]);
    }
  }
  for (const auto& [list, at, name] :
       {std::tuple{c.prefix_lens, b, "prefix_lens"}, std::tuple{c.seq_lens, b, "seq_lens"},
        std::tuple{c.cu_kept, b + 1, "cu_kept"}, std::tuple{c.cu_rows, b + 1, "cu_rows"}}) {
    if (list.data != nullptr && (list[at] < 0 || list[at] > kMost)) {
      return join(name, ": expected values in [0, ", kMost, "], got ", list[at]);
    }
  }
  const SequenceRows rows = sequence_rows(c, b);
  if (rows.kept > rows.source) {
    return join("cu_kept: expected at most ", rows.source, " rows for sequence ", b, ", got ",
                rows.kept);
  }
  if (rows.total < rows.prefix + rows.source) {
    return join("seq_lens: expected at least ", rows.prefix, " + ", rows.source,
                " (prefix and rows to choose from) for sequence ", b, ", got ", rows.total);
  }
  int64_t room = c.num_tokens;
  if (c.placement == Placement::kPacked) room = c.seq_starts[b + 1] - c.seq_starts[b];
  if (c.placement == Placement::kPaged) room = c.table_width * c.num_tokens;
  if (rows.total > room) {
    return join("seq_lens: expected at most ", room, " rows, the room of sequence ", b, ", got ",
                rows.total);
  }
  return "";
}

// Rows must rise within a sequence: it is what makes moving them in place safe.
std::string find_order_fault(const Compaction& c, int64_t index) {
  const char* name = c.by_segments ? "segments" : "keep_indices";
  for (int32_t b = 0; b < c.batch; ++b) {
    const SequenceRows rows = sequence_rows(c, b);
    int64_t last = -1;
    int64_t bad = -1;
    for_each_run(rows_that_stay(c, index), rows.first_kept, rows.first_kept + rows.kept,
                 [&](int64_t, int64_t source, int64_t count) {
                   const int64_t row = source - rows.first_row;
                   if (row <= last || row + count > rows.source) bad = row;
                   last = row + count - 1;
                 });
    if (bad != -1) {
      return join(name, ": expected rising rows in [0, ", rows.source, ") for sequence ", b,
                  ", got ", bad);
    }
  }
  return "";
}

}  // namespace

std::string find_fault(const Compaction& c, const BlockList& read_only_blocks) {
  if (c.cu_kept[0] != 0) return join("cu_kept: expected the first to be 0, got ", c.cu_kept[0]);
  if (c.cu_rows.data != nullptr && c.cu_rows[0] != 0) {
    return join("cu_rows: expected the first to be 0, got ", c.cu_rows[0]);
  }
  for (int32_t b = 0; b < c.batch; ++b) {
    const std::string fault = find_length_fault(c, b);
    if (!fault.empty()) return fault;
  }
  if (c.placement == Placement::kPacked &&
      (c.seq_starts[0] < 0 || c.seq_starts[c.batch] > c.num_tokens)) {
    return join("seq_starts: expected boundaries in [0, ", c.num_tokens, "], got ", c.seq_starts[0],
                " to ", c.seq_starts[c.batch]);
  }
  if (c.by_segments) {
    if (c.num_segments == 0 && c.cu_kept[c.batch] > 0) {
      return join("segments: expected a table for ", c.cu_kept[c.batch], " rows, got an empty one");
    }
    std::string fault = find_fault(rows_that_stay(c, 0));
    if (fault.empty()) fault = find_order_fault(c, 0);
    if (!fault.empty()) return fault;
  } else if (c.cu_kept[c.batch] != c.num_indices) {
    return join("keep_indices: expected ", c.cu_kept[c.batch], " rows (cu_kept), got ",
                c.num_indices);
  } else {
    for (int64_t s = 0; s < int64_t{c.index_layers} * c.index_heads; ++s) {
      const std::string fault = find_order_fault(c, s * c.num_indices);
      if (!fault.empty()) return fault;
    }
  }
  if (c.placement != Placement::kPaged) return "";
  return find_page_fault({.compaction = c, .read_only_blocks = read_only_blocks});
}

namespace {

// With edit_table: in the order of move_at; only rows that move forwards are joined.
std::vector<Run> find_runs_by_page(const Compaction& c, int32_t b, int64_t index) {
  const SequenceRows rows = sequence_rows(c, b);
  const auto size = static_cast<int32_t>(c.num_tokens);
  std::vector<Run> runs;
  if (rows.dropped() == 0) return runs;
  Page page{};
  for (int32_t i = rows.prefix / size * size; i < rows.new_total(); ++i) {
    const bool begins = i % size == 0;
    if (begins) page = page_of(c, rows, index, i);
    const RowMove move = move_in_page(c, rows, index, page, i);
    if (move.from == move.to) continue;
    const Place to = place_in_cache(c, b, move.to);
    const Place from = place_in_cache(c, b, move.from);
    Run* last = begins || page.backwards || runs.empty() ? nullptr : &runs.back();
    if (last != nullptr && last->from.block == from.block && last->to.block == to.block &&
        last->from.token + last->count == from.token && last->to.token + last->count == to.token) {
      ++last->count;
    } else {
      runs.push_back({to, from, 1});
    }
  }
  return runs;
}

}  // namespace

std::vector<Run> find_runs(const Compaction& c, int32_t b, int64_t index) {
  if (c.edit_table) return find_runs_by_page(c, b, index);
  const SequenceRows rows = sequence_rows(c, b);
  const bool paged = c.placement == Placement::kPaged;
  const int64_t size = c.num_tokens;
  std::vector<Run> runs;
  const auto add = [&](int64_t row, int64_t source, int64_t count) {
    while (count > 0 && row != source) {
      const int64_t part =
          paged ? std::min({count, size - row % size, size - source % size}) : count;
      runs.push_back({place_in_cache(c, b, static_cast<int32_t>(row)),
                      place_in_cache(c, b, static_cast<int32_t>(source)), part});
      row += part;
      source += part;
      count -= part;
    }
  };
  for_each_run(rows_that_stay(c, index), rows.first_kept, rows.first_kept + rows.kept,
               [&](int64_t number, int64_t source, int64_t count) {
                 add(rows.prefix + number - rows.first_kept, rows.prefix + source - rows.first_row,
                     count);
               });
  const int64_t suffix = rows.prefix + rows.source;
  add(rows.prefix + rows.kept, suffix, rows.total - suffix);
  return runs;
}

void move_runs(const std::vector<Run>& runs, const CacheTensor& tensor, std::byte* base,
               int64_t begin, int64_t end) {
  const bool dense = tensor.token_stride == end - begin;
  base += begin;
  for (size_t r = 0; r < runs.size(); ++r) {
    const Run& run = runs[r];
    // Rows that lie apart, or on pages of their own, are no stream that a processor would foresee.
    if (r + kRunsAhead < runs.size()) {
      const std::byte* next = base + offset_in(tensor, runs[r + kRunsAhead].from);
      const std::byte* place = base + offset_in(tensor, runs[r + kRunsAhead].to);
      const int64_t some = std::min<int64_t>(end - begin, kBytesAhead);
      for (int64_t i = 0; i < some; i += kCacheLine) {
        __builtin_prefetch(next + i);
        __builtin_prefetch(place + i, 1);
      }
    }
    std::byte* to = base + offset_in(tensor, run.to);
    const std::byte* from = base + offset_in(tensor, run.from);
    if (dense && run.count > 1) {
      std::memmove(to, from, run.count * tensor.token_stride);
      continue;
    }
    // Row after row from the first: of a run of more than one the places aren't behind where the
    // rows come from, so what they cover has been moved already.
    for (int64_t i = 0; i < run.count; ++i) {
      copy_bytes(to + i * tensor.token_stride, from + i * tensor.token_stride, end - begin);
    }
  }
}

void write_outputs(const Compaction& c, const CompactionOutputs& out) {
  if (out.indptr != nullptr) out.indptr[0] = 0;
  for (int32_t b = 0; b < c.batch; ++b) {
    const SequenceRows rows = sequence_rows(c, b);
    out.seq_lens[b] = rows.new_total();
    out.slots[b] = next_slot(c, rows, b);
    if (out.indptr == nullptr) continue;
    const int32_t pages = pages_of(c, rows.new_total());
    out.indptr[b + 1] = out.indptr[b] + pages;
    out.last_page_len[b] = last_page_len(c, rows.new_total());
    for (int32_t page = 0; out.table != nullptr && page < c.table_width; ++page) {
      set_table_entry(c, out, b, page, table_entry(c, rows, b, page));
    }
  }
}

}  // namespace adsc::cpu
