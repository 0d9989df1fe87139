// rebuild_metadata, also for boundary_step and compress_step: what one boundary makes of a batch's
// layout, that is lengths, spans and the segment table of the stage that follows. The table's
// length depends on shapes only, as a captured graph needs.
#pragma once

#include <string>

#include "../boundary.h"

namespace adsc::cpu {

// What is wrong with the layout, in words; empty when nothing is.
std::string find_layout_fault(const BatchLayout& layout, const Boundary& boundary);

// The segments of a sequence: before each span its text, then the span_segments of the span; at the
// end the text that is left. Segments that aren't needed are empty.
void rebuild_metadata(const MetadataStep& step);

}  // namespace adsc::cpu
