// What a boundary makes of a layout that lies on the device.
#pragma once

#include "../layout.h"
#include "stream.h"

namespace adsc::cuda {

// One block does it all, so that no block waits for another; 1024 spans or sequences at a time.
void rebuild_metadata(const BatchLayout& layout, const Boundary& boundary,
                      const StageMetadata& stage, Stream stream);

}  // namespace adsc::cuda
