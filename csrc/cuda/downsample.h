// downsample and downsample_many: moving the rows that survive, byte for byte.
#pragma once

#include <span>

#include "../movement.h"
#include "stream.h"

namespace adsc::cuda {

// Copies the rows of any number of tensors, of any widths. One launch for every 16 tensors.
void copy_rows(const RowMap& map, std::span<const RowCopy> copies, Stream stream);

}  // namespace adsc::cuda
