// rebuild_metadata: what a boundary makes of a layout that lies on the device.
#pragma once

#include "../boundary.h"
#include "stream.h"

namespace adsc::cuda {

// By blocks of 128 sequences or more, of which none waits for another: each counts for itself what
// is dropped before it.
void rebuild_metadata(const MetadataStep& step, Stream stream);

}  // namespace adsc::cuda
