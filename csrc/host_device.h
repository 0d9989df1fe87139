// Marks what both host and device code call.
#pragma once

#if defined(__CUDACC__)
#define ADSC_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined( \
    ADSC_SIMT)  // always inlined: the emulator sees the accesses of what it compiled itself
#define ADSC_HOST_DEVICE inline __attribute__((always_inline))
#else
#define ADSC_HOST_DEVICE inline
#endif
