// upsample_grad: the backward of moving rows.
#pragma once

#include "../movement.h"
#include "stream.h"

namespace adsc::cuda {

// Writes every source row. A row taken several times gets its gradients' sum in rising order of the
// output rows, so that the result is the same in every run.
void add_rows(const RowMap& map, const RowScatter& scatter, Stream stream);

}  // namespace adsc::cuda
