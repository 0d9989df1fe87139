// Rows over the threads of the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace adsc::ops {

// Below this many bytes for each thread, waking it costs more than it saves.
constexpr int64_t kBytesPerThread = 128 << 10;

// Runs body(begin, end) over [0, count) on torch's own threads (torch.set_num_threads).
template <class Body>
void parallel_rows(int64_t count, int64_t bytes_per_row, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes_per_row));
  if (count <= grain) {
    if (count > 0) body(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, body);
  }
}

}  // namespace adsc::ops
