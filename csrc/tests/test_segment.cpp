// The keep rule against its definition in rational arithmetic, for every span of up to 64 rows, and
// the segment lookup against a scan.
#include <cmath>
#include <vector>

#include "check.h"
#include "segment.h"

namespace adsc {
namespace {

int64_t defined_index(int32_t pattern, int64_t j, int64_t n, int64_t m) {
  const long double exact = pattern == kStart    ? static_cast<long double>(j) * n / m
                            : pattern == kCenter ? (j + 0.5L) * n / m
                            : m == 1             ? 0.0L
                                     : static_cast<long double>(j) * (n - 1) / (m - 1) + 0.5L;
  return static_cast<int64_t>(std::floor(exact + 1e-12L));
}

void test_keep_rule() {
  for (int32_t pattern : {kStart, kCenter, kLinspace}) {
    for (int64_t n = 0; n <= 64; ++n) {
      for (int64_t m = 0; m <= n; ++m) {
        std::vector<int64_t> kept;
        for (int64_t j = 0; j < m; ++j) {
          kept.push_back(kept_index(pattern, j, n, m));
          CHECK(kept[j] == defined_index(pattern, j, n, m));
          CHECK(0 <= kept[j] && kept[j] < n);
          CHECK(j == 0 || kept[j - 1] < kept[j]);
        }
        for (int64_t x = 0; x <= n; ++x) {
          int64_t below = 0;
          for (const int64_t k : kept) below += k < x;
          CHECK(kept_before(pattern, x, n, m) == below);
        }
      }
    }
  }
}

void test_kept_count() {
  for (int64_t n = 0; n <= 64; ++n) {
    for (int64_t den = 1; den <= 12; ++den) {
      for (int64_t num = 0; num <= den; ++num) {
        const int64_t m = kept_count(n, num, den);
        CHECK(m * den >= n * num && (m - 1) * den < n * num);
      }
    }
  }
  CHECK(kept_count((1LL << 31) - 1, (1LL << 31) - 2, (1LL << 31) - 1) == (1LL << 31) - 2);
}

void test_aligned_kept_count() {
  for (int64_t n = 0; n <= 64; ++n) {
    for (int64_t m = 0; m <= n; ++m) {
      for (int64_t block = 1; block <= 20; ++block) {
        const int64_t kept = aligned_kept_count(n, m, block);
        CHECK((n - kept) % block == 0 && m <= kept && kept < m + block && kept <= n);
      }
    }
  }
}

void test_lookup() {
  // Empty segments share their dst with the next one and never hold a row.
  const Segment table[] = {{0, 0, 3, 3, 0, kStart},
                           {3, 3, 0, 0, 0, kStart},
                           {3, 3, 8, 2, 0, kStart},
                           {5, 11, 4, 4, 0, kStart},
                           {9, 20, 0, 0, 0, kStart}};
  const int64_t sources[] = {0, 1, 2, 3, 7, 11, 12, 13, 14};
  for (int64_t row = 0; row < 9; ++row) {
    const Segment& found = table[find_segment(table, 5, row)];
    CHECK(source_row(found, row) == sources[row]);
  }
}

}  // namespace
}  // namespace adsc

int main() {
  adsc::test_keep_rule();
  adsc::test_kept_count();
  adsc::test_aligned_kept_count();
  adsc::test_lookup();
  return adsc::test::failures() != 0;
}
