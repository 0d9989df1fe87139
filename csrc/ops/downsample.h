// The move of one tensor, from its checked layout; for the ops that move rows.
#pragma once

#include "ops/check.h"

namespace adsc::ops {

// From the rows of x, each of `layout`, into `out`.
RowCopy row_copy(const Tensor& x, const RowLayout& layout, const Tensor& out);

}  // namespace adsc::ops
