// What one boundary makes of a batch's layout: lengths, spans and the segment table of the stage
// that follows, from tensors alone. The table's length depends on shapes only, as a captured graph
// needs.
#pragma once

#include <string>

#include "../layout.h"

namespace adsc::cpu {

// What is wrong with the layout, in words; empty when nothing is.
std::string find_layout_fault(const BatchLayout& layout, const Boundary& boundary);

// The segments of a sequence: before each span its text, then the span_blocks of the span; at the
// end the text that is left. Blocks that aren't needed are empty.
void rebuild_metadata(const BatchLayout& layout, const Boundary& boundary,
                      const StageMetadata& out);

}  // namespace adsc::cpu
