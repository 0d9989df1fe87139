// A boundary over a layout that lies on the device: a scan over the spans tells for each how many
// rows are dropped before it and so where its survivors go. For rebuild_metadata, and, where one
// block can scan them in one go, for boundary_step and compress_step.
#pragma once

#include <cstdint>

#include "../boundary.h"
#include "rows.cuh"

namespace adsc::cuda {

// Sequences that one block writes the metadata of, and spans that it scans in one go.
constexpr int kBlockSequences = 128;
constexpr int kBlockSpans = 128;

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
  SpanMove spans[kBlockSpans];
  int32_t warp_sums[kThreads / kWarp];
};

// Whether a block finds its rows, and one writes the metadata, in a single scan.
ADSC_HOST_DEVICE bool scans_once(const BatchLayout& layout) {
  return layout.num_sequences <= kBlockSequences && layout.num_spans <= kBlockSpans;
}

struct SpanSize {
  int32_t sequence, length, kept;
};

__device__ __forceinline__ SpanSize span_size(const BatchLayout& layout, const Boundary& boundary,
                                              int64_t i) {
  const int32_t* span = layout.spans + i * layout.span_columns;
  SpanSize size{load(span), load(span + 2), 0};
  if (boundary.grid) {
    size.kept = static_cast<int32_t>(kept(load(span + 3), boundary.keep_rows) *
                                     kept(load(span + 4), boundary.keep_columns));
  } else {
    size.kept = static_cast<int32_t>(kept(size.length, boundary.keep_columns));
  }
  return size;
}

// Nothing past the last.
__device__ __forceinline__ SpanMove read_span(const BatchLayout& layout, const Boundary& boundary,
                                              int64_t i) {
  SpanMove move{};
  if (i >= layout.num_spans) return move;
  const int32_t* span = layout.spans + i * layout.span_columns;
  const SpanSize size = span_size(layout, boundary, i);
  move.source = load(layout.cu_seqlens + size.sequence) + load(span + 1);
  move.length = size.length;
  move.kept = size.kept;
  if (boundary.grid) {
    move.height = load(span + 3);
    move.width = load(span + 4);
    move.kept_columns = static_cast<int32_t>(kept(move.width, boundary.keep_columns));
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

// The source row of an output row of the stage. spans: at least the last whose survivors begin at
// the row or before, if any, and all before it.
__device__ __forceinline__ int64_t source_in_layout(const SpanMove* spans, int num_spans,
                                                    const Boundary& boundary, int64_t row) {
  int low = -1;  // that one; -1: the row lies before any
  int high = num_spans;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (spans[middle].source - spans[middle].dropped <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  if (low < 0) return row;
  const SpanMove& span = spans[low];
  const int64_t j = row - (span.source - span.dropped);
  return j < span.kept ? survivor(span, boundary, j) : row + span.dropped + span.length - span.kept;
}

// rows[i] = the source row of output row begin + i, for i in [0, count), or kNoRow past the stage's
// end. The layout is one that is scanned once. All threads of the block, at least kBlockSpans, call
// it; ends with a barrier.
__device__ inline void find_rows(const BatchLayout& layout, const Boundary& boundary, int64_t begin,
                                 int count, int64_t* rows, ScanSpace& space) {
  const auto num_spans = static_cast<int>(layout.num_spans);
  SpanMove span = read_span(layout, boundary, threadIdx.x);
  int32_t dropped;  // by all
  span.dropped = sum_before(span.length - span.kept, space.warp_sums, dropped);
  if (static_cast<int>(threadIdx.x) < num_spans) space.spans[threadIdx.x] = span;
  __syncthreads();
  const int64_t num_tokens = load(layout.cu_seqlens + layout.num_sequences) - dropped;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t row = begin + i;
    rows[i] = row < num_tokens ? source_in_layout(space.spans, num_spans, boundary, row) : kNoRow;
  }
  __syncthreads();
}

// ---- Writing the stage's metadata ----

// The sequences that a block writes the metadata of, their spans, and the rows dropped before them.
struct Part {
  int64_t sequence, sequences_end;
  int64_t span, spans_end;
  int32_t dropped;
};

// The part of all.
__device__ __forceinline__ Part whole(const BatchLayout& layout) {
  return {0, layout.num_sequences, 0, layout.num_spans, 0};
}

// The part of sequences [begin, end). The block counts what lies before them by itself: it reads
// all spans, which takes less time than to wait for other blocks.
__device__ inline Part part_of(const MetadataStep& step, int64_t begin, int64_t end,
                               int32_t* warp_sums) {
  const BatchLayout& layout = step.layout;
  int32_t before = 0;
  int32_t within = 0;
  int32_t dropped = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < layout.num_spans; i += blockDim.x) {
    const SpanSize size = span_size(layout, step.boundary, i);
    const bool earlier = size.sequence < begin;
    before += earlier;
    within += !earlier && size.sequence < end;
    dropped += earlier ? size.length - size.kept : 0;
  }
  const auto sum = [&](int32_t value) {
    int32_t total;
    sum_before(value, warp_sums, total);
    return total;
  };
  before = sum(before);
  return {begin, end, before, before + sum(within), sum(dropped)};
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

// The table holds, sequence by sequence, for each span its text before it and its span_segments,
// and then the text after the last span; so the place of each is known from the numbers of its span
// and sequence alone.
struct StageTable {
  const MetadataStep& step;

  __device__ __forceinline__ const int32_t* span(int64_t i) const {
    return step.layout.spans + i * step.layout.span_columns;
  }
  __device__ __forceinline__ int32_t* next_span(int64_t i) const {
    return step.stage.spans + i * span_columns(step.boundary);
  }
  __device__ __forceinline__ Segment* segments_of(int64_t i, int64_t sequence) const {
    return step.stage.segments + i * (1 + step.boundary.span_segments) + sequence;
  }
  // Where a written span's survivors begin: at the end of the text before it.
  __device__ __forceinline__ int32_t begin_of(int64_t i) const {
    const Segment& text = *segments_of(i, next_span(i)[0]);
    return text.dst + text.keep;
  }
};

// The segments of span i, of which `before` rows are dropped before it, and its row of stage.spans
// but for the start.
__device__ __forceinline__ void write_span(const StageTable& table, const SpanMove& span, int64_t i,
                                           int64_t before) {
  const Boundary& boundary = table.step.boundary;
  const BatchLayout& layout = table.step.layout;
  const int32_t* row = table.span(i);
  const int32_t* last = row - layout.span_columns;
  const int32_t sequence = load(row);
  const bool follows = i > 0 && load(last) == sequence;
  const int64_t text_source =
      load(layout.cu_seqlens + sequence) + (follows ? load(last + 1) + load(last + 2) : 0);
  const int64_t text = span.source - text_source;
  const int64_t dst = span.source - before;
  Segment* out = table.segments_of(i, sequence);
  *out++ = segment(dst - text, text_source, text, text, kStart);

  int32_t* next = table.next_span(i);
  next[0] = sequence;
  next[2] = span.kept;
  if (!boundary.grid) {
    *out = segment(dst, span.source, span.length, span.kept, boundary.pattern);
    return;
  }
  const int64_t kept_rows = kept(span.height, boundary.keep_rows);
  for (int64_t r = 0; r < boundary.span_segments; ++r) {
    if (r < kept_rows) {
      const int64_t source =
          span.source + kept_index(kStart, r, span.height, kept_rows) * span.width;
      out[r] = segment(dst + r * span.kept_columns, source, span.width, span.kept_columns, kStart);
    } else {
      out[r] = segment(dst + span.kept, span.source + span.length, 0, 0, kStart);
    }
  }
  next[3] = static_cast<int32_t>(kept_rows);
  next[4] = span.kept_columns;
}

// The number of the part's last span in sequences up to `sequence`, plus one.
__device__ __forceinline__ int64_t spans_until(const StageTable& table, const Part& part,
                                               int64_t sequence) {
  int64_t low = part.span;
  int64_t high = part.spans_end;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load(table.span(middle)) <= sequence) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The text after the last span of sequence b, and where the next sequence begins. The part's spans
// are written.
__device__ __forceinline__ void write_sequence(const StageTable& table, const Part& part,
                                               int64_t b) {
  const int32_t* cu_seqlens = table.step.layout.cu_seqlens;
  const int64_t count = spans_until(table, part, b);
  int64_t source = load(cu_seqlens + b);
  int64_t before = part.dropped;
  if (count > part.span) {
    const int32_t* row = table.span(count - 1);
    const int32_t sequence = load(row);
    const int64_t end = load(cu_seqlens + sequence) + load(row + 1) + load(row + 2);
    before = end - (table.begin_of(count - 1) + table.next_span(count - 1)[2]);
    if (sequence == b) source = end;
  }
  const int64_t end = load(cu_seqlens + b + 1);
  *table.segments_of(count, b) =
      segment(source - before, source, end - source, end - source, kStart);
  table.step.stage.cu_seqlens[b + 1] = static_cast<int32_t>(end - before);
}

// The metadata of a part, but for max_seqlen: returns the longest of its sequences, to every
// thread. All threads of the block call it; warp_sums: shared, one a warp.
__device__ inline int32_t write_metadata(const MetadataStep& step, const Part& part,
                                         int32_t* warp_sums) {
  const StageTable table{step};
  const StageMetadata& stage = step.stage;
  int64_t dropped = part.dropped;
  for (int64_t first = part.span; first < part.spans_end; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    SpanMove span{};
    if (i < part.spans_end) span = read_span(step.layout, step.boundary, i);
    int32_t total;
    const int64_t before = dropped + sum_before(span.length - span.kept, warp_sums, total);
    dropped += total;
    if (i < part.spans_end) write_span(table, span, i, before);
  }
  __syncthreads();
  for (int64_t b = part.sequence + threadIdx.x; b < part.sequences_end; b += blockDim.x) {
    write_sequence(table, part, b);
  }
  __syncthreads();

  // The block before, if any, writes where the part's first sequence begins.
  const int32_t begin = load(step.layout.cu_seqlens + part.sequence) - part.dropped;
  const auto begin_of = [&](int64_t b) { return b == part.sequence ? begin : stage.cu_seqlens[b]; };
  for (int64_t i = part.span + threadIdx.x; i < part.spans_end; i += blockDim.x) {
    int32_t* next = table.next_span(i);
    next[1] = table.begin_of(i) - begin_of(next[0]);
  }
  int32_t longest = 0;
  for (int64_t b = part.sequence + threadIdx.x; b < part.sequences_end; b += blockDim.x) {
    const int32_t length = stage.cu_seqlens[b + 1] - begin_of(b);
    stage.seq_lens[b] = length;
    longest = length > longest ? length : longest;
  }
  if (threadIdx.x == 0) {
    if (part.sequence == 0) stage.cu_seqlens[0] = 0;
    if (part.sequences_end == step.layout.num_sequences) {
      *stage.num_tokens = begin_of(part.sequences_end);
    }
  }
  return largest(longest, warp_sums);
}

}  // namespace adsc::cuda
