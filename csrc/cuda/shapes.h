// How many threads work side by side on a row, so that few of them idle. On the host; no CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace adsc::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, at most

// Accesses of a row that a thread of a norm keeps in registers.
constexpr int kKept = 4;

// `columns`, with those that idle lanes would have in the last round over a row.
constexpr int64_t rounded_up(int64_t columns, int64_t lanes) {
  return (columns + lanes - 1) / lanes * lanes;
}

// Threads of a row in a norm, whole warps: those that leave the fewest lanes idle with at most
// kKept columns each, and the fewest of those. Of a longer row kKept columns a thread are kept, and
// the rest is read again. Measured on an H100 with 16-bit rows of 4096: 128 threads by four and 256
// by two are level; of 5120: so are 160 by four and 320 by two, and 256 by four, of which a third
// are idle, take 15 % longer.
constexpr int norm_group(int64_t columns) {
  int best = kThreads;
  int64_t least = INT64_MAX;
  for (const int kept : {kKept, 2, 3, 1}) {
    const int64_t group = rounded_up((columns + kept - 1) / kept, kWarp);
    if (group <= kThreads && group * kept < least) {
      best = static_cast<int>(group);
      least = group * kept;
    }
  }
  return best;
}

// Threads side by side on a row that is copied by a block of `threads`, whole warps: the most that
// leave the fewest idle, and less than a warp only for rows as narrow as that.
constexpr int copy_lanes(int64_t columns, int threads) {
  int best = threads;
  for (int lanes = threads; lanes >= 1;) {
    if (lanes < kWarp && columns > lanes) break;
    if (rounded_up(columns, lanes) < rounded_up(columns, best)) best = lanes;
    const bool halves = lanes <= kWarp || lanes % (2 * kWarp) == 0;
    lanes = halves ? lanes / 2 : kWarp;
  }
  return best;
}

}  // namespace adsc::cuda
