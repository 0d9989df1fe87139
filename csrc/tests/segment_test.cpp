// segment.h against counting by hand.
#include "segment.h"

#include <vector>

#include "check.h"

using namespace adsc;

namespace {

// Kept indices strictly increase inside [0, n), and kept_before counts exactly them.
void keep_rule() {
  for (int32_t pattern : {kStart, kCenter, kLinspace}) {
    for (int64_t n = 0; n <= 40; ++n) {
      for (int64_t m = 0; m <= n; ++m) {
        std::vector<bool> kept(n, false);
        int64_t last = -1;
        for (int64_t j = 0; j < m; ++j) {
          const int64_t index = kept_index(pattern, j, n, m);
          CHECK(index > last && index < n);
          if (index < 0 || index >= n) return;
          kept[index] = true;
          last = index;
        }
        int64_t count = 0;
        for (int64_t x = 0; x <= n; ++x) {
          CHECK(kept_before(pattern, x, n, m) == count);
          if (x < n) count += kept[x];
        }
      }
    }
  }
}

void keep_count_rounds_up() {
  CHECK(kept_count(576, 1, 4) == 144);
  CHECK(kept_count(577, 1, 4) == 145);
  CHECK(kept_count(0, 1, 4) == 0);
  CHECK(kept_count(9, 0, 1) == 0);
  CHECK(kept_count(9, 1, 1) == 9);
}

// The largest span and count that an int32 row can name: no product overflows.
void largest_span() {
  const int64_t n = 2147483647, m = n - 1;
  for (int32_t pattern : {kStart, kCenter, kLinspace}) {
    const int64_t last = kept_index(pattern, m - 1, n, m);
    CHECK(last >= m - 1 && last < n);
    CHECK(kept_before(pattern, n, n, m) == m);
    CHECK(kept_before(pattern, last, n, m) == m - 1);
  }
}

void lookup_skips_empty_segments() {
  // 3 rows of text, an image that keeps none, 2 of 4 rows of another, 1 row of text.
  const std::vector<Segment> table = {
      {0, 0, 3, 3, 0, kStart}, {3, 3, 5, 0, 0, kStart}, {3, 8, 4, 2, 0, kStart}, {5, 12, 1, 1, 0, kStart}};
  const std::vector<int64_t> sources = {0, 1, 2, 8, 10, 12};
  for (int64_t row = 0; row < static_cast<int64_t>(sources.size()); ++row) {
    const int32_t at = find_segment(table.data(), static_cast<int32_t>(table.size()), row);
    CHECK(source_row(table[at], row) == sources[row]);
  }
}

}  // namespace

int main() {
  keep_rule();
  keep_count_rounds_up();
  largest_span();
  lookup_skips_empty_segments();
  return failures == 0 ? 0 : 1;
}
