// The keep rule and the segment lookup: the one definition that the planner, the CPU kernels and
// the CUDA kernels share. No torch, no allocation. adsc_kernels/reference.py holds the Python twin,
// tested against this file.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace adsc {

// How kept indices spread over a span. The `grid` pattern has no entry: it is kStart on the rows of
// the span, and one kStart segment for each row that is kept.
enum Pattern : int32_t { kStart = 0, kCenter = 1, kLinspace = 2 };

// m = ceil(n * numerator / denominator). Arguments below 2^31, so the product fits 64 bits.
ADSC_HOST_DEVICE int64_t kept_count(int64_t n, int64_t numerator, int64_t denominator) {
  return (n * numerator + denominator - 1) / denominator;
}

// The least count of at least `kept` of n rows whose dropped rows, n less it, fill whole blocks:
// what follows the span then keeps its offset within a cache block. A block of 1 changes nothing.
ADSC_HOST_DEVICE int64_t aligned_kept_count(int64_t n, int64_t kept, int64_t block) {
  return n - (n - kept) / block * block;
}

// a / b for a >= 0, b > 0. The 64-bit division takes several times as long where the 32-bit one
// will do, on a CPU and on a GPU.
ADSC_HOST_DEVICE int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// How m rows are spread over n: kept row j lies at (offset + j * step) / divisor, rounded down.
struct Sampling {
  int64_t offset;
  int64_t step;
  int64_t divisor;
};

// Requires 0 < m <= n < 2^31. Linspace is round_half_up(j * (n - 1) / (m - 1)); of a single row it
// is the first, as under kStart.
ADSC_HOST_DEVICE Sampling sampling(int32_t pattern, int64_t n, int64_t m) {
  if (pattern == kCenter) return {n, 2 * n, 2 * m};
  if (pattern == kLinspace && m > 1) return {m - 1, 2 * (n - 1), 2 * (m - 1)};
  return {0, n, m};
}

// The index, in [0, n), of the j-th of m kept rows. Requires 0 <= j < m <= n < 2^31.
ADSC_HOST_DEVICE int64_t kept_index(int32_t pattern, int64_t j, int64_t n, int64_t m) {
  const Sampling s = sampling(pattern, n, m);
  return divide(s.offset + j * s.step, s.divisor);
}

// How many kept indices lie below x: the inverse of kept_index, which cuts a span into chunks
// without moving a survivor. Requires 0 <= x <= n and 0 <= m <= n < 2^31.
ADSC_HOST_DEVICE int64_t kept_before(int32_t pattern, int64_t x, int64_t n, int64_t m) {
  if (x <= 0) return 0;
  if (x >= n) return m;  // whole spans, the common case, cost no division
  if (m == 0) return 0;
  const Sampling s = sampling(pattern, n, m);
  const int64_t room = x * s.divisor - s.offset;  // of the j with j * step < room
  if (room <= 0) return 0;
  const int64_t count = divide(room + s.step - 1, s.step);
  return count < m ? count : m;
}

// One row of a segment table: output rows dst, dst + 1, ... (up to the next segment's dst, or the
// end of the output) take the kept rows number first, first + 1, ... of the `keep` rows that are
// spread over `span` source rows. `src` is the source row at which index 0 of the span lies; it may
// be negative where a chunk begins inside the span. Plain text is keep == span, first == 0.
struct Segment {
  int32_t dst;
  int32_t src;
  int32_t span;
  int32_t keep;
  int32_t first;
  int32_t pattern;
};
constexpr int kSegmentColumns = 6;
static_assert(sizeof(Segment) == kSegmentColumns * sizeof(int32_t), "a table row is six int32");

ADSC_HOST_DEVICE int64_t source_row(const Segment& s, int64_t row) {
  return s.src + kept_index(s.pattern, s.first + (row - s.dst), s.span, s.keep);
}

// The last segment whose dst is at most `row`: segments are sorted by dst, and empty ones share
// their dst with the segment after them, so the last is the one that holds the row.
ADSC_HOST_DEVICE int32_t find_segment(const Segment* table, int32_t count, int64_t row) {
  int32_t low = 0;
  int32_t high = count;  // table[low].dst <= row < table[high].dst
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (table[middle].dst <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace adsc
