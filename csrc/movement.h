// What the kernels of the token path are given, on a CPU and on a GPU alike: where output rows come
// from, and what is done with them. Pointers, and strides in bytes from one row to the next; rows
// without a stride lie right behind one another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"
#include "segment.h"

namespace adsc {

// The source row of every output row: a segment table, or a list of indices of either width.
struct RowMap {
  int64_t num_tokens = 0;  // output rows
  int64_t num_rows = 0;    // source rows
  const Segment* segments = nullptr;
  int32_t num_segments = 0;
  const int32_t* indices32 = nullptr;
  const int64_t* indices64 = nullptr;
};

// One tensor whose surviving rows are copied.
struct RowCopy {
  const std::byte* x = nullptr;
  int64_t stride = 0;
  std::byte* out = nullptr;
  int64_t row_bytes = 0;
};

// Residual add and RMSNorm: residual_out = x + residual in the element type, and
// normed = residual_out / sqrt(mean(residual_out^2) + eps) * weight, rounded once.
struct RowNorm {
  const std::byte* x = nullptr;
  int64_t x_stride = 0;
  const std::byte* residual = nullptr;
  int64_t residual_stride = 0;
  const std::byte* weight = nullptr;
  std::byte* normed = nullptr;
  std::byte* residual_out = nullptr;
  int64_t width = 0;  // elements of a row
  double eps = 0;
  Element element = Element::kFloat;
};

// The backward of moving rows: every source row gets the sum of the gradients of the output rows
// that took it, and 0 where none did. A complex element is two real ones.
struct RowScatter {
  const std::byte* grad;
  std::byte* out;
  int64_t row_size;  // elements of a row
  Element element;
};

}  // namespace adsc
