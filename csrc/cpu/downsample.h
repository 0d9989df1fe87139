// Moving rows, byte for byte, and adding them back. No torch: pointers and strides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rows.h"

namespace adsc::cpu {

// One tensor whose surviving rows are copied: out is dense, the rows of x lie `stride` bytes apart.
struct RowCopy {
  const std::byte* x;
  int64_t stride;
  std::byte* out;
  int64_t row_bytes;
};

// Copies the output rows [begin, end).
void copy_rows(const RowMap& map, const RowCopy& copy, int64_t begin, int64_t end);

}  // namespace adsc::cpu
