#include <algorithm>

#include "check.h"
#include "launch.h"
#include "rows.cuh"

namespace adsc::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    check_rows_kernel(const __grid_constant__ RowMap map, bool at_most) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row + 1 < map.num_segments && map.segments[row].dst > map.segments[row + 1].dst) {
    trap("segments: expected dst in rising order, got %lld after %lld at row %lld",
         map.segments[row + 1].dst, map.segments[row].dst, row + 1);
  }
  if (row >= map.num_tokens) return;
  if (map.segments == nullptr) {
    const int64_t source = map.indices64 != nullptr ? map.indices64[row] : map.indices32[row];
    if (source < 0 || source >= map.num_rows) {
      trap("keep_indices: expected a value in [0, %lld), got %lld at position %lld", map.num_rows,
           source, row);
    }
    return;
  }
  const int32_t s = find_segment(map.segments, map.num_segments, row);
  const Segment& segment = map.segments[s];
  const int64_t number = segment.first + (row - segment.dst);
  if (at_most && s + 1 == map.num_segments && number >= segment.keep) return;
  if (row < segment.dst || segment.first < 0 || number >= segment.keep ||
      segment.keep > segment.span || segment.pattern < kStart || segment.pattern > kLinspace) {
    trap("segments: row %lld (dst %lld) does not describe output row %lld, its kept row %lld", s,
         segment.dst, row, number);
  }
  const int64_t source = source_row(segment, row);
  if (source < 0 || source >= map.num_rows) {
    trap("segments: row %lld takes output row %lld from %lld, expected a row in [0, %lld)", s, row,
         source, map.num_rows);
  }
}

// One thread for each sequence and for each span.
__global__ void __launch_bounds__(kThreads)
    check_layout_kernel(const __grid_constant__ MetadataStep step, int64_t num_rows) {
  const BatchLayout& layout = step.layout;
  const Boundary& boundary = step.boundary;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int32_t* cu = layout.cu_seqlens;
  if (i <= layout.num_sequences) {
    const int64_t before = i == 0 ? 0 : cu[i - 1];
    if ((i == 0 && cu[0] != 0) || cu[i] < before) {
      trap("cu_seqlens: expected rising values from 0, got %lld after %lld at position %lld", cu[i],
           before, i);
    }
    if (cu[i] > num_rows) {
      trap("cu_seqlens: expected at most %lld, the rows there are, got %lld at position %lld",
           num_rows, cu[i], i);
    }
  }
  if (i >= layout.num_spans) return;
  const int32_t* span = layout.spans + i * layout.span_columns;
  const int64_t sequence = span[0];
  const int64_t start = span[1];
  const int64_t length = span[2];
  if (sequence < 0 || sequence >= layout.num_sequences) {
    trap("spans: row %lld: expected a sequence in [0, %lld), got %lld", i, layout.num_sequences,
         sequence);
  }
  int64_t position = 0;  // where the span before ends, in the same sequence
  if (i > 0) {
    const int32_t* before = span - layout.span_columns;
    if (before[0] > sequence) {
      trap("spans: row %lld: expected sequences in order, got %lld after %lld", i, sequence,
           before[0]);
    }
    if (before[0] == sequence) position = int64_t{before[1]} + before[2];
  }
  if (start < position || length < 0 || start + length > cu[sequence + 1] - cu[sequence]) {
    trap("spans: row %lld: start %lld, length %lld: expected them within the sequence, after %lld",
         i, start, length, position);
  }
  if (layout.span_columns == 5) {
    const int64_t height = span[3];
    const int64_t width = span[4];
    if (height < 0 || width < 0 || height * width != length ||
        (boundary.grid && kept(height, boundary.keep_rows) > boundary.span_segments)) {
      trap(
          "spans: row %lld: height %lld, width %lld: expected height x width of the length, %lld, "
          "and a height of at most max_height",
          i, height, width, length);
    }
  }
}

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

}  // namespace

void check_rows(const RowMap& map, Stream stream, bool at_most) {
  // One thread for each output row and for each segment.
  const int64_t count = std::max<int64_t>(map.num_tokens, map.num_segments);
  launch(check_rows_kernel, blocks_for(count), kThreads, 0, stream, map, at_most);
}

void check_layout(const MetadataStep& step, int64_t num_rows, Stream stream) {
  const int64_t count = std::max(step.layout.num_sequences + 1, step.layout.num_spans);
  launch(check_layout_kernel, blocks_for(count), kThreads, 0, stream, step, num_rows);
}

}  // namespace adsc::cuda
