// downsample_add_rms_norm: residual add and RMSNorm of the rows that survive, which are the only
// ones read.
#pragma once

#include "../movement.h"
#include "stream.h"

namespace adsc::cuda {

void add_rms_norm_rows(const RowMap& map, const RowNorm& norm, Stream stream);

}  // namespace adsc::cuda
