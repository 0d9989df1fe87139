// Where an op branches on the device: last, when all is checked and allocated.
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

// Calls on_cpu() or on_cuda(stream), by where `tensor` lies. on_cuda takes an `auto` stream: it is
// compiled only where the library holds the launchers that it names.
template <class OnCpu, class OnCuda>
void run_on_device_of([[maybe_unused]] const Tensor& tensor, const OnCpu& on_cpu,
                      [[maybe_unused]] const OnCuda& on_cuda) {
#if defined(ADSC_WITH_CUDA)
  if (!host_can_read(tensor)) {
    const OnDevice device(tensor);
    return on_cuda(device.stream());
  }
#endif
  on_cpu();
}

// ADSC_CHECK=1, read once: kernels check every segment, index and layout entry.
bool device_checks();

}  // namespace adsc::ops
