// Where output rows come from, for the CPU kernels: a walk over a segment table or over explicit
// indices, and the check of either before anything is written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "../movement.h"

namespace adsc::cpu {

// What is wrong with the map, in words; empty when nothing is.
std::string find_fault(const RowMap& map);

inline bool is_run(const Segment& segment) { return segment.keep == segment.span; }

// The kept rows of one segment in order, without a division for each: from one to the next it takes
// an addition and a carry.
class KeptRows {
 public:
  KeptRows(const Segment& segment, int64_t output_row) {
    const Sampling s = sampling(segment.pattern, segment.span, segment.keep);
    const int64_t start = s.offset + (segment.first + (output_row - segment.dst)) * s.step;
    const int64_t index = divide(start, s.divisor);
    row_ = segment.src + index;
    rest_ = start - index * s.divisor;
    whole_step_ = divide(s.step, s.divisor);
    rest_step_ = s.step - whole_step_ * s.divisor;
    divisor_ = s.divisor;
  }

  int64_t row() const { return row_; }

  void advance() {
    row_ += whole_step_;
    rest_ += rest_step_;
    if (rest_ >= divisor_) {  // well predicted; as arithmetic it took four times as long
      rest_ -= divisor_;
      ++row_;
    }
  }

 private:
  int64_t row_, rest_, whole_step_, rest_step_, divisor_;
};

// Calls visit(output_row, source_row, count) over the output rows [begin, end): `count` output rows
// take as many source rows that follow each other. The map has passed find_fault. Map and visit are
// values, so that what visit writes through a byte pointer can't be taken to change them.
template <class Visit>
void for_each_run(const RowMap map, int64_t begin, int64_t end, const Visit visit) {
  if (begin >= end) return;
  if (map.indices32 != nullptr) {
    for (int64_t row = begin; row < end; ++row) visit(row, int64_t{map.indices32[row]}, int64_t{1});
    return;
  }
  if (map.indices64 != nullptr) {
    for (int64_t row = begin; row < end; ++row) visit(row, map.indices64[row], int64_t{1});
    return;
  }
  int64_t row = begin;
  for (int32_t s = find_segment(map.segments, map.num_segments, begin); row < end; ++s) {
    const Segment& segment = map.segments[s];
    const int64_t next = s + 1 < map.num_segments ? map.segments[s + 1].dst : map.num_tokens;
    const int64_t stop = std::min(end, next);
    if (stop <= row) continue;  // an empty segment
    if (is_run(segment)) {
      visit(row, segment.src + segment.first + (row - segment.dst), stop - row);
      row = stop;
    } else {
      for (KeptRows kept(segment, row); row < stop; ++row, kept.advance()) {
        visit(row, kept.row(), int64_t{1});
      }
    }
  }
}

}  // namespace adsc::cpu
