// Residual add and RMSNorm of the rows that survive, which are the only ones read. No torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"
#include "rows.h"

namespace adsc::cpu {

// Strides in bytes between rows; weight, normed and residual_out are dense.
struct RowNorm {
  const std::byte* x;
  int64_t x_stride;
  const std::byte* residual;
  int64_t residual_stride;
  const std::byte* weight;
  std::byte* normed;
  std::byte* residual_out;
  int64_t width;  // elements of a row
  double eps;
  Element element;
};

// Writes the output rows [begin, end): residual_out = x + residual in the element type, and
// normed = residual_out / sqrt(mean(residual_out^2) + eps) * weight, rounded once.
void add_rms_norm_rows(const RowMap& map, const RowNorm& norm, int64_t begin, int64_t end);

}  // namespace adsc::cpu
