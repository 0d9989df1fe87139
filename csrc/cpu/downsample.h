// downsample and downsample_many, also for boundary_step and compress_step: moving rows, byte for
// byte.
#pragma once

#include <cstdint>

#include "rows.h"

namespace adsc::cpu {

// Copies the output rows [begin, end).
void copy_rows(const RowMap& map, const RowCopy& copy, int64_t begin, int64_t end);

}  // namespace adsc::cpu
