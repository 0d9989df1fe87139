// Schedule x layout -> stage tables, on the host. No torch: module.cpp hands in integers and takes
// out one packed int32 buffer, so that a plan costs one upload.
#pragma once

#include <cstdint>
#include <vector>

#include "boundary.h"

namespace adsc {

// An image inside a prompt: `length` tokens from position `start` of sequence `sequence`. With a
// height the span is that many rows of `width` vision tokens, `pitch` tokens apart: what lies
// between them (LLaVA-NeXT's newline token) is text and stays. Without, height is 1 and width the
// length.
struct VisionSpan {
  int64_t sequence;
  int64_t start;
  int64_t length;
  int64_t height;
  int64_t width;
  int64_t pitch;
};

// Positions [begin, end) of a prompt, run now; what lies before is in the cache already.
struct Chunk {
  int64_t begin;
  int64_t end;
};

// A span of which a stage keeps more than the schedule asks, so that whole blocks are dropped.
struct Rounding {
  VisionSpan span;
  int64_t wanted;
  int64_t kept;
};

// Every array is per stage, or per stage and sequence. Row counts are of the chunk alone.
struct StageTables {
  std::vector<Segment> segments;    // rows of the stage before -> rows of this one
  std::vector<int32_t> cu_seqlens;  // B + 1
  std::vector<int32_t> cached;      // B: rows of this stage that precede the chunk
  std::vector<Rounding> rounded;
  bool identity = true;  // nothing was dropped since the stage before
};

// One table per stage. `cu_seqlens` is of whole prompts; spans come in any order; one chunk for
// each sequence. Each stage keeps so much of a span that a multiple of `align` of all its tokens is
// gone; the roundings do not add up, since each starts from what the schedule itself asks of the
// span. A grid keeps whole rows and columns: it is left as it is, and the rounding that it lacks is
// in `rounded`. Throws std::invalid_argument that names the argument.
std::vector<StageTables> make_plan(const std::vector<Boundary>& boundaries,
                                   const std::vector<int64_t>& cu_seqlens,
                                   std::vector<VisionSpan> spans, const std::vector<Chunk>& chunks,
                                   int64_t align = 1);

// out[row] = source row, for every row of a table whose output has out_rows rows.
void expand(const Segment* table, int32_t count, int64_t out_rows, int64_t* out);

// Constant-stride segments that map row i to sources[i], which strictly increase: the form in which
// a mapping across several boundaries, no longer one uniform sampling, still needs no index tensor.
std::vector<Segment> compress(const int64_t* sources, int64_t count);

}  // namespace adsc
