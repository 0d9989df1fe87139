// downsample_add_rms_norm, also for boundary_step and compress_step: residual add and RMSNorm of
// the rows that survive, which are the only ones read.
#pragma once

#include <cstdint>

#include "rows.h"

namespace adsc::cpu {

// Writes the output rows [begin, end).
void add_rms_norm_rows(const RowMap& map, const RowNorm& norm, int64_t begin, int64_t end);

}  // namespace adsc::cpu
