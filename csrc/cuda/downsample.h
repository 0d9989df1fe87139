// Moving the rows that survive, byte for byte.
#pragma once

#include "../movement.h"
#include "stream.h"

namespace adsc::cuda {

// Copies the rows of `count` tensors, of any widths. One launch for every 16 tensors.
void copy_rows(const RowMap& map, const RowCopy* copies, int count, Stream stream);

}  // namespace adsc::cuda
