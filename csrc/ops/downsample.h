// The move of one tensor, from its checked layout; for the ops that move rows.
#pragma once

#include "ops/check.h"

namespace adsc::ops {

// Of the rows of x, each of `layout`; where to is left open.
RowCopy row_copy(const Tensor& x, const RowLayout& layout);

}  // namespace adsc::ops
