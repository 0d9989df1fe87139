// rebuild_metadata: what a boundary makes of a layout that lies on the device.
#pragma once

#include "../boundary.h"
#include "stream.h"

namespace adsc::cuda {

// One block does it all, so that no block waits for another; 1024 spans or sequences at a time.
void rebuild_metadata(const MetadataStep& step, Stream stream);

}  // namespace adsc::cuda
