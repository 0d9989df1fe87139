#include "rebuild_metadata.h"

#include <algorithm>

#include "../text.h"

namespace adsc::cpu {

std::string find_layout_fault(const BatchLayout& layout, const Boundary& boundary) {
  const int32_t* cu = layout.cu_seqlens;
  if (cu[0] != 0) return join("cu_seqlens: expected 0 first, got ", cu[0]);
  for (int64_t b = 0; b < layout.num_sequences; ++b) {
    if (cu[b + 1] < cu[b]) {
      return join("cu_seqlens: expected rising values, got ", cu[b + 1], " after ", cu[b]);
    }
  }
  int64_t sequence = -1;
  int64_t position = 0;  // where the span before ends, in the same sequence
  for (int64_t i = 0; i < layout.num_spans; ++i) {
    const int32_t* span = layout.spans + i * layout.span_columns;
    const int64_t start = span[1];
    const int64_t length = span[2];
    const auto fault = [&](const auto&... parts) {
      return join("spans: row ", i, " (sequence ", span[0], ", start ", start, ", length ", length,
                  "): ", parts...);
    };
    if (span[0] < 0 || span[0] >= layout.num_sequences) {
      return fault("expected a sequence in [0, ", layout.num_sequences, ")");
    }
    if (span[0] < sequence) return fault("expected sequences in order, got it after ", sequence);
    if (span[0] > sequence) position = 0;
    sequence = span[0];
    if (start < position) {
      return fault("expected a start of at least ", position, ", where the span before it ends");
    }
    if (length < 0) return fault("expected a length of at least 0");
    position = start + length;
    const int64_t available = cu[sequence + 1] - cu[sequence];
    if (position > available) return fault("expected an end of at most the sequence's ", available);
    if (layout.span_columns == 5) {
      const int64_t height = span[3];
      const int64_t width = span[4];
      if (height < 0 || width < 0 || height * width != length) {
        return fault("expected height x width of the length, got ", height, " x ", width);
      }
      if (boundary.grid && kept(height, boundary.keep_rows) > boundary.span_segments) {
        return fault("expected a height of at most max_height, got ", height);
      }
    }
  }
  return "";
}

void rebuild_metadata(const MetadataStep& step) {
  const auto& [layout, boundary, out] = step;
  Segment* segment = out.segments;
  int64_t dst = 0;
  const auto emit = [&](int64_t src, int64_t span, int64_t keep, int32_t pattern) {
    *segment++ = {static_cast<int32_t>(dst),
                  static_cast<int32_t>(src),
                  static_cast<int32_t>(span),
                  static_cast<int32_t>(keep),
                  0,
                  pattern};
    dst += keep;
  };

  out.cu_seqlens[0] = 0;
  int32_t longest = 0;
  int64_t i = 0;
  for (int64_t b = 0; b < layout.num_sequences; ++b) {
    const int64_t begin = dst;
    int64_t source = layout.cu_seqlens[b];  // how far the sequence's rows have been dealt with
    for (; i < layout.num_spans && layout.spans[i * layout.span_columns] == b; ++i) {
      const int32_t* span = layout.spans + i * layout.span_columns;
      const int64_t start = layout.cu_seqlens[b] + span[1];
      emit(source, start - source, start - source, kStart);
      source = start + span[2];

      int32_t* next = out.spans + i * span_columns(boundary);
      next[0] = static_cast<int32_t>(b);
      next[1] = static_cast<int32_t>(dst - begin);
      if (boundary.grid) {
        const int64_t height = span[3];
        const int64_t width = span[4];
        const int64_t rows = kept(height, boundary.keep_rows);
        const int64_t columns = kept(width, boundary.keep_columns);
        for (int64_t r = 0; r < rows; ++r) {
          emit(start + kept_index(kStart, r, height, rows) * width, width, columns, kStart);
        }
        for (int64_t r = rows; r < boundary.span_segments; ++r) emit(source, 0, 0, kStart);
        next[3] = static_cast<int32_t>(rows);
        next[4] = static_cast<int32_t>(columns);
      } else {
        emit(start, span[2], kept(span[2], boundary.keep_columns), boundary.pattern);
      }
      next[2] = static_cast<int32_t>(dst - begin - next[1]);
    }
    const int64_t text = layout.cu_seqlens[b + 1] - source;
    emit(source, text, text, kStart);
    out.cu_seqlens[b + 1] = static_cast<int32_t>(dst);
    out.seq_lens[b] = static_cast<int32_t>(dst - begin);
    longest = std::max(longest, out.seq_lens[b]);
  }
  *out.num_tokens = static_cast<int32_t>(dst);
  *out.max_seqlen = longest;
}

}  // namespace adsc::cpu
