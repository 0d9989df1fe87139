// A boundary over a layout that lies on the device, by one block: a scan over the spans, which
// tells for each how many rows are dropped before it and so where its survivors go. For
// rebuild_metadata, boundary_step and compress_step.
#pragma once

#include <cstdint>

#include "../boundary.h"
#include "rows.cuh"

namespace adsc::cuda {

// One span and what the boundary makes of it. All rows are counted in the batch.
struct SpanMove {
  int32_t source;  // its first row
  int32_t length;
  int32_t kept;
  int32_t dropped;  // rows dropped before it; its first survivor is output row source - dropped
  int32_t height;   // for a grid
  int32_t width;
  int32_t kept_columns;
};

// What a block shares while it scans.
struct ScanSpace {
  SpanMove spans[kThreads];
  int32_t warp_sums[kThreads / kWarp];
};

__device__ __forceinline__ SpanMove read_span(const BatchLayout& layout, const Boundary& boundary,
                                              int64_t i) {
  SpanMove move{};
  if (i >= layout.num_spans) return move;
  const int32_t* span = layout.spans + i * layout.span_columns;
  move.source = load(layout.cu_seqlens + load(span)) + load(span + 1);
  move.length = load(span + 2);
  if (boundary.grid) {
    move.height = load(span + 3);
    move.width = load(span + 4);
    move.kept_columns = static_cast<int32_t>(kept(move.width, boundary.keep_columns));
    move.kept = static_cast<int32_t>(kept(move.height, boundary.keep_rows)) * move.kept_columns;
  } else {
    move.kept = static_cast<int32_t>(kept(move.length, boundary.keep_columns));
  }
  return move;
}

// Where the survivor number `j` of a span lies.
__device__ __forceinline__ int64_t survivor(const SpanMove& span, const Boundary& boundary,
                                            int64_t j) {
  if (!boundary.grid) {
    return span.source + kept_index(boundary.pattern, j, span.length, span.kept);
  }
  const int64_t row = divide(j, span.kept_columns);
  const int64_t column = j - row * span.kept_columns;
  const int64_t kept_rows = divide(span.kept, span.kept_columns);
  return span.source + kept_index(kStart, row, span.height, kept_rows) * span.width +
         kept_index(kStart, column, span.width, span.kept_columns);
}

// rows[i] = the source row of output row begin + i, for i in [0, count), or kNoRow past the stage's
// end. All threads of the block call it; ends with a barrier.
__device__ inline void find_rows(const BatchLayout& layout, const Boundary& boundary, int64_t begin,
                                 int count, int64_t* rows, ScanSpace& space) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) rows[i] = begin + i;  // before any span
  int64_t dropped = 0;
  bool more = true;  // spans that may lie before the tile's end
  for (int64_t first = 0; more && first < layout.num_spans; first += blockDim.x) {
    const int64_t left = layout.num_spans - first;
    const int size = static_cast<int>(left < blockDim.x ? left : blockDim.x);
    SpanMove span = read_span(layout, boundary, first + threadIdx.x);
    int32_t total;
    const int32_t before = sum_before(span.length - span.kept, space.warp_sums, total);
    span.dropped = static_cast<int32_t>(dropped + before);
    space.spans[threadIdx.x] = span;
    __syncthreads();
    dropped += total;
    const int64_t reached = space.spans[0].source - space.spans[0].dropped;
    more = reached < begin + count;
    // Rows that the next spans reach are theirs.
    const bool last = left <= blockDim.x;
    const int64_t next =
        last ? begin + count : read_span(layout, boundary, first + size).source - dropped;
    if (more && next > begin) {
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int64_t row = begin + i;
        if (row < reached) continue;
        int low = 0;  // the last span whose survivors begin at `row` or before
        int high = size;
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          if (space.spans[middle].source - space.spans[middle].dropped <= row) {
            low = middle;
          } else {
            high = middle;
          }
        }
        const SpanMove& span = space.spans[low];
        const int64_t j = row - (span.source - span.dropped);
        rows[i] = j < span.kept ? survivor(span, boundary, j)
                                : row + span.dropped + span.length - span.kept;
      }
    }
    __syncthreads();  // before space.spans is written again
  }
  if (more) {  // all spans are counted, and rows may lie past the end
    const int64_t num_tokens = load(layout.cu_seqlens + layout.num_sequences) - dropped;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      if (begin + i >= num_tokens) rows[i] = kNoRow;
    }
  }
  __syncthreads();
}

// The number of spans in sequences up to `sequence`, included.
__device__ __forceinline__ int64_t spans_until(const BatchLayout& layout, int64_t sequence) {
  int64_t low = 0;
  int64_t high = layout.num_spans;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load(layout.spans + middle * layout.span_columns) <= sequence) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ __forceinline__ Segment segment(int64_t dst, int64_t src, int64_t span, int64_t keep,
                                           int32_t pattern) {
  return {static_cast<int32_t>(dst),
          static_cast<int32_t>(src),
          static_cast<int32_t>(span),
          static_cast<int32_t>(keep),
          0,
          pattern};
}

// All of the stage's metadata, by one block. The table holds, sequence by sequence, for each span
// its text before it and its span_segments, and then the text after the last span; so the
// place of each is known from the numbers of its span and sequence alone. warp_sums: shared, one a
// warp.
__device__ inline void write_metadata(const MetadataStep& step, int32_t* warp_sums) {
  const BatchLayout& layout = step.layout;
  const Boundary& boundary = step.boundary;
  const StageMetadata& stage = step.stage;
  const int64_t per_span = 1 + boundary.span_segments;
  const int64_t columns = layout.span_columns;
  const int64_t next_columns = span_columns(boundary);

  // Spans, each with the text before it.
  int64_t dropped = 0;
  for (int64_t first = 0; first < layout.num_spans; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const SpanMove span = read_span(layout, boundary, i);
    int32_t total;
    const int64_t before = dropped + sum_before(span.length - span.kept, warp_sums, total);
    dropped += total;
    if (i >= layout.num_spans) continue;
    const int32_t* row = layout.spans + i * columns;
    const int32_t sequence = load(row);
    const bool follows = i > 0 && load(row - columns) == sequence;
    const int64_t text_source = load(layout.cu_seqlens + sequence) +
                                (follows ? load(row - columns + 1) + load(row - columns + 2) : 0);
    const int64_t text = span.source - text_source;
    const int64_t dst = span.source - before;
    Segment* out = stage.segments + i * per_span + sequence;
    *out++ = segment(dst - text, text_source, text, text, kStart);

    int32_t* next = stage.spans + i * next_columns;
    next[0] = sequence;
    next[2] = span.kept;
    if (boundary.grid) {
      const int64_t kept_rows = kept(span.height, boundary.keep_rows);
      for (int64_t r = 0; r < boundary.span_segments; ++r) {
        if (r < kept_rows) {
          const int64_t source =
              span.source + kept_index(kStart, r, span.height, kept_rows) * span.width;
          out[r] =
              segment(dst + r * span.kept_columns, source, span.width, span.kept_columns, kStart);
        } else {
          out[r] = segment(dst + span.kept, span.source + span.length, 0, 0, kStart);
        }
      }
      next[3] = static_cast<int32_t>(kept_rows);
      next[4] = span.kept_columns;
    } else {
      *out = segment(dst, span.source, span.length, span.kept, boundary.pattern);
    }
  }
  __syncthreads();

  // Where a span's survivors begin: at the end of the text before it, which is written by now.
  const auto begins = [&](int64_t i) {
    const Segment& text = stage.segments[i * per_span + stage.spans[i * next_columns]];
    return text.dst + text.keep;
  };

  // Sequences, each with the text after its last span.
  for (int64_t b = threadIdx.x; b < layout.num_sequences; b += blockDim.x) {
    const int64_t count = spans_until(layout, b);
    int64_t source = load(layout.cu_seqlens + b);
    int64_t before = 0;
    if (count > 0) {
      const int32_t* row = layout.spans + (count - 1) * columns;
      const int32_t sequence = load(row);
      const int64_t end = load(layout.cu_seqlens + sequence) + load(row + 1) + load(row + 2);
      before = end - (begins(count - 1) + stage.spans[(count - 1) * next_columns + 2]);
      if (sequence == b) source = end;
    }
    const int64_t end = load(layout.cu_seqlens + b + 1);
    stage.segments[count * per_span + b] =
        segment(source - before, source, end - source, end - source, kStart);
    stage.cu_seqlens[b + 1] = static_cast<int32_t>(end - before);
  }
  if (threadIdx.x == 0) stage.cu_seqlens[0] = 0;
  __syncthreads();

  for (int64_t i = threadIdx.x; i < layout.num_spans; i += blockDim.x) {
    int32_t* next = stage.spans + i * next_columns;
    next[1] = begins(i) - stage.cu_seqlens[next[0]];
  }
  int32_t longest = 0;
  for (int64_t b = threadIdx.x; b < layout.num_sequences; b += blockDim.x) {
    const int32_t length = stage.cu_seqlens[b + 1] - stage.cu_seqlens[b];
    stage.seq_lens[b] = length;
    longest = length > longest ? length : longest;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, longest, distance);
    longest = other > longest ? other : longest;
  }
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = longest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
      longest = warp_sums[warp] > longest ? warp_sums[warp] : longest;
    }
    *stage.max_seqlen = longest;
    *stage.num_tokens = stage.cu_seqlens[layout.num_sequences];
  }
}

}  // namespace adsc::cuda
