// The arguments of the residual add and norm, checked; for the ops that do it.
#pragma once

#include "ops/check.h"

namespace adsc::ops {

// All but the outputs, which are of the shape of x with num_tokens rows. name: what the caller
// calls x.
RowNorm norm_of(const Tensor& x, const char* name, const Tensor& residual, const Tensor& weight,
                int64_t num_tokens, double eps);

}  // namespace adsc::ops
