// upsample_grad: the backward of moving rows.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace adsc::cpu {

// The output rows by source row: those of source row r are rows[starts[r]] .. rows[starts[r + 1] -
// 1], in rising order, so that a sum is the same for every number of threads.
struct Takers {
  std::vector<int64_t> starts;
  std::vector<int64_t> rows;
};
Takers find_takers(const RowMap& map);

// Writes the source rows [begin, end) of out.
void add_rows(const Takers& takers, const RowScatter& scatter, int64_t begin, int64_t end);

}  // namespace adsc::cpu
