// A boundary of the schedule, and what rebuild_metadata makes of a batch at it. No torch.
#pragma once

#include <cstdint>

#include "segment.h"

namespace adsc {

struct Fraction {
  int64_t numerator = 1;
  int64_t denominator = 1;
};

ADSC_HOST_DEVICE int64_t kept(int64_t n, const Fraction& keep) {
  return kept_count(n, keep.numerator, keep.denominator);
}

// What stays of a span. Under the grid pattern rows and columns of a height x width span; under the
// others a span is a single row, whatever its shape, and keep_rows is 1.
struct Boundary {
  int32_t pattern = kStart;  // kStart for a grid
  bool grid = false;
  Fraction keep_rows{};
  Fraction keep_columns{};
  // Segments of a span in a table whose length is fixed before the spans are known: a grid's most
  // kept rows, else 1. Only rebuild_metadata writes such a table.
  int64_t span_segments = 1;
};

// The sequences of a batch and their vision spans.
struct BatchLayout {
  const int32_t* cu_seqlens;  // [num_sequences + 1]
  int64_t num_sequences;
  const int32_t* spans;  // [num_spans, span_columns]: sequence, start, length[, height, width]
  int64_t num_spans;
  int64_t span_columns;  // 3 or 5
};

// The metadata of the stage that a boundary opens.
struct StageMetadata {
  int32_t* cu_seqlens;  // [num_sequences + 1]
  int32_t* spans;       // [num_spans, span_columns(boundary)], like a layout's
  Segment* segments;    // [num_sequences + num_spans * (1 + span_segments)]
  int32_t* seq_lens;    // [num_sequences]
  int32_t* num_tokens;  // one
  int32_t* max_seqlen;  // one
};

ADSC_HOST_DEVICE int64_t span_columns(const Boundary& boundary) { return boundary.grid ? 5 : 3; }

// A boundary over a layout that lies in memory, in place of a plan's segment table.
struct MetadataStep {
  BatchLayout layout;
  Boundary boundary;
  StageMetadata stage;
};

// Rows of the stage's segment table.
ADSC_HOST_DEVICE int64_t num_segments(const MetadataStep& step) {
  return step.layout.num_sequences + step.layout.num_spans * (1 + step.boundary.span_segments);
}

}  // namespace adsc
