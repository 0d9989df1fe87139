// What of a kernel is not plain CUDA C++: memory accesses with a hint to the caches, and the end of
// a kernel whose check failed. Under ADSC_SIMT an emulator on the CPU takes the place of this file.
#pragma once

#if defined(ADSC_SIMT)
#include "../tests/simt/device.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

namespace adsc::cuda {

// Reads what no thread writes during the kernel and that other threads or blocks read too.
template <class T>
__device__ __forceinline__ T load(const T* address) {
  return __ldg(address);
}

// Writes 1, 2, 4, 8 or 16 bytes. No hint: what an op writes is what the next kernel reads.
template <class T>
__device__ __forceinline__ void store(T* address, T value) {
  *address = value;
}

// The value as it is, of which the compiler knows nothing before this place: it can't unpack 16-bit
// numbers early and hold them as floats, in twice the registers.
__device__ __forceinline__ uint4 packed(uint4 value) {
  asm volatile("" : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w));
  return value;
}
template <class T>
__device__ __forceinline__ T packed(T value) {
  return value;
}

// Prints `what`, up to four numbers for its %lld, and the block; then ends the kernel with an
// error.
[[noreturn]] __device__ __noinline__ inline void trap(const char* what, long long a = 0,
                                                      long long b = 0, long long c = 0,
                                                      long long d = 0) {
  printf("adsc_kernels: ");
  printf(what, a, b, c, d);
  printf(" (block %d, thread %d)\n", static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x));
  __trap();
}

}  // namespace adsc::cuda
#endif
