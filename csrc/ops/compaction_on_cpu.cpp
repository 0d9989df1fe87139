// A compaction over the threads of the CPU.
#include <algorithm>
#include <vector>

#include "cpu/compact.h"
#include "ops/compaction_call.h"
#include "ops/parallel.h"

namespace adsc::ops {
namespace {

// Where there are fewer lines than this for each thread, they are cut into columns, so that a
// single sequence in few tensors keeps all threads busy; but not into smaller ones than that, and
// no more than need be: a row that is moved whole is faster than its parts (by a fifth at 8 KiB).
constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kColumnBytes = 1 << 10;

struct Part {
  const CacheTensor* tensor;
  int32_t line;
  int64_t begin, end;  // bytes of the line
};

using Moves = std::vector<cpu::Run>;

// The moves of each selection of rows in each sequence, once for all tensors and heads that share
// them.
std::vector<Moves> find_moves(const Compaction& c) {
  std::vector<Moves> moves;
  const int64_t selections = int64_t{c.index_layers} * c.index_heads;
  for (int64_t s = 0; s < selections; ++s) {
    for (int32_t b = 0; b < c.batch; ++b) {
      moves.push_back(cpu::find_runs(c, b, s * c.num_indices));
    }
  }
  return moves;
}

std::vector<Part> cut(const std::vector<CacheTensor>& tensors, int64_t batch) {
  int64_t lines = 0;
  for (const CacheTensor& tensor : tensors) lines += tensor.num_lines * batch;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = threads == 1 ? 1 : threads * kPartsPerThread;
  const int64_t cuts = std::max<int64_t>(1, wanted / std::max<int64_t>(1, lines));
  std::vector<Part> parts;
  for (const CacheTensor& tensor : tensors) {
    const int64_t column = std::max(kColumnBytes, tensor.line_bytes / cuts);
    for (int32_t line = 0; line < tensor.num_lines; ++line) {
      for (int64_t begin = 0; begin < tensor.line_bytes; begin += column) {
        const int64_t end = std::min<int64_t>(begin + column, tensor.line_bytes);
        parts.push_back({.tensor = &tensor, .line = line, .begin = begin, .end = end});
      }
    }
  }
  return parts;
}

}  // namespace

void run_on_cpu(const CompactionCall& call) {
  const Compaction& c = call.compaction;
  cpu::write_outputs(c, call.outputs);
  const std::vector<Moves> moves = find_moves(c);
  const std::vector<Part> parts = cut(call.tensors, c.batch);
  const auto count = static_cast<int64_t>(parts.size()) * c.batch;
  if (count == 0) return;
  int64_t rows = 0;
  for (const Moves& runs : moves) {
    for (const cpu::Run& run : runs) rows += run.count;
  }
  int64_t bytes = 0;
  for (const Part& part : parts) bytes += part.end - part.begin;
  const int64_t selections = int64_t{c.index_layers} * c.index_heads;
  parallel_rows(count, bytes * (rows / selections) / count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part& part = parts[i / c.batch];
      const int64_t b = i % c.batch;
      const CacheTensor& tensor = *part.tensor;
      const int64_t selection =
          c.num_indices == 0 ? 0 : index_of(c, tensor.layer, part.line) / c.num_indices;
      cpu::move_runs(moves[selection * c.batch + b], tensor,
                     tensor.base + part.line * tensor.line_stride, part.begin, part.end);
    }
  });
}

}  // namespace adsc::ops
