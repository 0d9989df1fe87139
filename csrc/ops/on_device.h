// The device side of an op.
#pragma once

#include "cuda/stream.h"
#include "ops/check.h"

#if !defined(ADSC_SIMT)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace adsc::ops {

// While it lives, the device of `tensor` is the current one. `stream` is torch's current stream
// there. (The emulator has neither.)
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);

  cuda::Stream stream() const { return stream_; }

 private:
#if !defined(ADSC_SIMT)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cuda::Stream stream_ = nullptr;
};

// ADSC_CHECK=1, read once: kernels check every segment, index and layout entry.
bool device_checks();

}  // namespace adsc::ops
