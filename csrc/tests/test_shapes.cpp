// How threads are cut to rows: no lane idles at the widths of common models, and every column has a
// thread.
#include <initializer_list>

#include "check.h"
#include "cuda/shapes.h"

namespace adsc::cuda {
namespace {

void test_norm_group() {
  for (const int64_t hidden : {2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192}) {
    const int64_t columns = hidden * 2 / 16;  // 16-bit numbers, 16 bytes at once
    const int group = norm_group(columns);
    CHECK(columns % group == 0);
    CHECK(columns / group <= kKept);
  }
  CHECK(norm_group(4096 * 2 / 16) == 128 && norm_group(5120 * 2 / 16) == 160);  // as measured
  for (int64_t columns = 1; columns <= 3000; ++columns) {
    const int group = norm_group(columns);
    CHECK(group % kWarp == 0 && group <= kThreads);
    CHECK(columns > kThreads * kKept ? group == kThreads : columns <= group * kKept);
  }
}

void test_copy_lanes() {
  for (int threads = 128; threads <= kThreads; threads += kWarp) {
    for (int64_t columns = 1; columns <= 3000; ++columns) {
      const int lanes = copy_lanes(columns, threads);
      CHECK(threads % lanes == 0);
      CHECK(lanes >= kWarp || columns <= lanes);
      CHECK(rounded_up(columns, lanes) - columns < kWarp);
    }
  }
  CHECK(copy_lanes(512, 128) == 128 && copy_lanes(512, 256) == 256);
  CHECK(copy_lanes(640, 160) == 160 && copy_lanes(640, 256) == 128);
  CHECK(copy_lanes(1, 224) == 1);
}

}  // namespace
}  // namespace adsc::cuda

int main() {
  adsc::cuda::test_norm_group();
  adsc::cuda::test_copy_lanes();
  return adsc::test::failures() != 0;
}
