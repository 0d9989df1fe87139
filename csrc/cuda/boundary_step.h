// All that a boundary does, in one launch: norm, moves, and the metadata where the layout is on the
// device.
#pragma once

#include "../layout.h"
#include "../movement.h"
#include "stream.h"

namespace adsc::cuda {

// A layout on the device in place of a table, and where its stage's metadata goes.
struct LayoutStep {
  BatchLayout layout;
  Boundary boundary;
  StageMetadata stage;
};

// map: where rows come from, or with `layout` only the numbers of rows; then rows past the stage's
// end come out as zeros. norm: null where nothing is normed. Copies past the 16th take launches of
// their own.
void boundary_step(const RowMap& map, const LayoutStep* layout, const RowNorm* norm,
                   const RowCopy* copies, int count, Stream stream);

// The copies alone, one launch for every 16.
void boundary_copies(const RowMap& map, const LayoutStep* layout, const RowCopy* copies, int count,
                     Stream stream);

}  // namespace adsc::cuda
