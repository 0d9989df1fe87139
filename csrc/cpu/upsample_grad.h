// The backward of moving rows: every source row gets the sum of the gradients of the output rows
// that took it, and 0 where none did.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "element.h"
#include "rows.h"

namespace adsc::cpu {

// The output rows by source row: those of source row r are rows[starts[r]] .. rows[starts[r + 1] -
// 1], in rising order, so that a sum is the same for every number of threads.
struct Takers {
  std::vector<int64_t> starts;
  std::vector<int64_t> rows;
};
Takers find_takers(const RowMap& map, int64_t num_rows);

// grad and out are dense; a complex element is two real ones.
struct RowScatter {
  const std::byte* grad;
  std::byte* out;
  int64_t row_size;
  Element element;
};

// Writes the source rows [begin, end) of out.
void add_rows(const Takers& takers, const RowScatter& scatter, int64_t begin, int64_t end);

}  // namespace adsc::cpu
