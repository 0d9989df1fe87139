// Which of this library's machine code a device would run: the Python side asks before it picks a
// backend. No torch.
#include <cuda_runtime.h>

namespace {
__global__ void probe() {}
}  // namespace

// Writes the architecture of the code that `device` would run (90 for sm_90a; after compilation
// from PTX too) and returns null; or returns why it can run none. The current device is put back.
extern "C" __attribute__((visibility("default"))) const char* adsc_device_code(int device,
                                                                               int* architecture) {
  int current = 0;
  cudaError_t status = cudaGetDevice(&current);
  if (status == cudaSuccess) {
    cudaFuncAttributes attributes;
    status = cudaSetDevice(device);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, probe);
    if (status == cudaSuccess) *architecture = attributes.binaryVersion;
    cudaSetDevice(current);
  }
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // not sticky: leave no error behind for the caller's next launch
  return cudaGetErrorString(status);
}
