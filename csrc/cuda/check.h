// ADSC_CHECK=1: kernels that look at every entry of what tells the others where to read and write.
// Put on the stream before those, they end it with a message where an entry points outside.
#pragma once

#include "../boundary.h"
#include "../movement.h"
#include "stream.h"

namespace adsc::cuda {

// Every output row's source row. at_most: a table may move fewer rows than num_tokens.
void check_rows(const RowMap& map, Stream stream, bool at_most = false);

// Every sequence and span, over at most num_rows source rows.
void check_layout(const MetadataStep& step, int64_t num_rows, Stream stream);

}  // namespace adsc::cuda
