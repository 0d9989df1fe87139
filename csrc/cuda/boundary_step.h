// boundary_step: all that a boundary does, in one launch: norm, moves, and the metadata where the
// layout is on the device.
#pragma once

#include <span>

#include "../boundary.h"
#include "../movement.h"
#include "stream.h"

namespace adsc::cuda {

struct BoundaryMoves {
  RowMap map{};  // with `metadata` only the numbers of rows
  // A layout on the device in place of a table: rows past its stage's end come out as zeros.
  const MetadataStep* metadata = nullptr;
  const RowNorm* norm = nullptr;  // null: nothing is normed
  std::span<const RowCopy> copies{};
};

// Copies past the 16th take launches of their own, and so do a norm that is not of 16 or 32-bit
// floats at 16-byte addresses, and the metadata of more sequences or spans than a block scans in
// one go.
void boundary_step(const BoundaryMoves& moves, Stream stream);

// Those copies: what is left to do where the first launch is another op's.
void boundary_copies(const BoundaryMoves& moves, Stream stream);

}  // namespace adsc::cuda
