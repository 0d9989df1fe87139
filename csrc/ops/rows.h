// The rows that the ops of the token path move: their shape, and where each comes from.
#pragma once

#include <cstdint>
#include <vector>

#include "movement.h"
#include "ops/check.h"

namespace adsc::ops {

// Rows along dimension 0, any distance apart, each contiguous inside.
struct RowShape {
  int64_t num_rows;
  int64_t row_size;    // elements of a row
  int64_t row_stride;  // elements from one row to the next
};
RowShape row_shape(const Tensor& x, const char* name);

// The move of the rows of x; where to is left open.
RowCopy row_copy(const Tensor& x, const RowShape& shape);
int64_t bytes_per_row(const std::vector<RowCopy>& copies);

struct SegmentTable {
  const Segment* segments;
  int32_t count;
};
SegmentTable segment_table(const Tensor& segments, const Tensor& x, const char* x_name);

// The map from output rows to the rows of x, from whichever of the two was given. What they hold is
// checked where the host can read it, on CPU. at_most: the table may move fewer than num_tokens
// rows, as one for a batch that is shorter than what was allocated.
RowMap row_map(const OptionalTensor& segments, const OptionalTensor& keep_indices,
               int64_t num_tokens, int64_t num_rows, const Tensor& x, const char* x_name,
               bool at_most = false);

// The element in which gradients are summed; a complex number is two of them.
Element element_of(const Tensor& tensor, const char* name);
int64_t real_parts(const Tensor& tensor);

}  // namespace adsc::ops
