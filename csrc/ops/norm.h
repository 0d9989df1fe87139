// The arguments of the residual add and norm, checked; for downsample_add_rms_norm, boundary_step
// and compress_step.
#pragma once

#include "movement.h"
#include "ops/check.h"

namespace adsc::ops {

struct NormArguments {
  const Tensor& x;
  const char* x_name;  // what the caller calls it
  const Tensor& residual;
  const Tensor& weight;
  double eps;
};

// All but the outputs, which have the shape of x with the number of output rows.
RowNorm row_norm(const NormArguments& arguments);

}  // namespace adsc::ops
