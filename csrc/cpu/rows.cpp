#include "rows.h"

#include <limits>
#include <type_traits>

#include "../text.h"

namespace adsc::cpu {
namespace {

std::string find_segment_fault(const RowMap& map) {
  if (map.num_segments == 0) return "";
  if (map.segments[0].dst != 0) {
    return join("segments: expected the first dst to be 0, got ", map.segments[0].dst);
  }
  for (int32_t s = 0; s < map.num_segments; ++s) {
    const Segment& segment = map.segments[s];
    const bool last = s + 1 == map.num_segments;
    const int64_t next = last ? map.num_tokens : map.segments[s + 1].dst;
    const int64_t count = next - segment.dst;
    if (count == 0) continue;
    const auto fault = [&](const auto&... parts) {
      return join("segments: row ", s, " (dst ", segment.dst, ", src ", segment.src, ", span ",
                  segment.span, ", keep ", segment.keep, ", first ", segment.first, ", pattern ",
                  segment.pattern, "): ", parts...);
    };
    if (count < 0) {
      return last ? fault("expected dst of at most num_tokens, ", map.num_tokens)
                  : fault("expected dst in rising order, got ", next, " after it");
    }
    if (next > map.num_tokens) {
      return fault("expected output rows below num_tokens, ", map.num_tokens, ", got up to ", next);
    }
    if (segment.pattern < kStart || segment.pattern > kLinspace) {
      return fault("expected pattern 0, 1 or 2");
    }
    if (segment.keep < 1 || segment.keep > segment.span) return fault("expected 1 <= keep <= span");
    if (segment.first < 0 || segment.first + count > segment.keep) {
      return fault("expected its ", count, " output rows to be kept rows below keep");
    }
    // kept_index rises, so the first and the last source row bound the others.
    const int64_t low = KeptRows(segment, segment.dst).row();
    const int64_t high = KeptRows(segment, next - 1).row();
    if (low < 0 || high >= map.num_rows) {
      return fault("expected source rows in [0, ", map.num_rows, "), got ", low, " to ", high);
    }
  }
  return "";
}

template <class Index>
std::string find_index_fault(const Index* indices, int64_t count, int64_t num_rows) {
  // The sign bit of `bad` is set by any index below 0 or past the last row: a sum and an or, which
  // vectorize where a 64-bit comparison does not.
  const auto last =
      static_cast<Index>(std::min<int64_t>(num_rows - 1, std::numeric_limits<Index>::max()));
  using Unsigned = std::make_unsigned_t<Index>;
  Unsigned bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    bad |= static_cast<Unsigned>(indices[i]) |
           (static_cast<Unsigned>(last) - static_cast<Unsigned>(indices[i]));
  }
  if (static_cast<Index>(bad) >= 0) return "";
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= num_rows) {
      return join("keep_indices: expected values in [0, ", num_rows, "), got ", indices[i],
                  " at position ", i);
    }
  }
  return "";
}

}  // namespace

std::string find_fault(const RowMap& map) {
  if (map.indices32 != nullptr) {
    return find_index_fault(map.indices32, map.num_tokens, map.num_rows);
  }
  if (map.indices64 != nullptr) {
    return find_index_fault(map.indices64, map.num_tokens, map.num_rows);
  }
  return find_segment_fault(map);
}

}  // namespace adsc::cpu
