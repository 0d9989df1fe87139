// The layout of a batch, a boundary, and the stage that it opens: what rebuild_metadata takes and
// writes. No torch.
#pragma once

#include <cstdint>

#include "segment.h"

namespace adsc {

struct BatchLayout {
  const int32_t* cu_seqlens;  // [num_sequences + 1]
  int64_t num_sequences;
  const int32_t* spans;  // [num_spans, span_columns]: sequence, start, length[, height, width]
  int64_t num_spans;
  int64_t span_columns;  // 3 or 5
};

struct Fraction {
  int64_t numerator;
  int64_t denominator;
};

struct Boundary {
  int32_t pattern;      // kStart, kCenter or kLinspace; kStart for a grid
  bool grid;            // keep rows and columns of spans with a height and a width
  Fraction keep;        // of a span; for a grid, of its rows
  Fraction keep_cols;   // for a grid
  int64_t span_blocks;  // segments for each span: 1; for a grid, the most rows one can keep
};

struct StageMetadata {
  int32_t* cu_seqlens;  // [num_sequences + 1]
  int32_t* spans;       // [num_spans, 5 for a grid, else 3]
  Segment* segments;    // [num_sequences + num_spans * (1 + span_blocks)]
  int32_t* seq_lens;    // [num_sequences]
  int32_t* num_tokens;  // one
  int32_t* max_seqlen;  // one
};

ADSC_HOST_DEVICE int64_t kept(int64_t n, const Fraction& keep) {
  return kept_count(n, keep.numerator, keep.denominator);
}

}  // namespace adsc
