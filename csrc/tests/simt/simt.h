// The CUDA that kernels may use, on a CPU: what csrc/cuda includes in place of cuda_runtime.h when
// it is compiled by a C++ compiler with ADSC_SIMT. Kernels are compiled with -fsanitize=thread,
// whose hooks (access.cpp) see every load and store of theirs: there threads give way to each
// other, and bounds, alignment, initialization and races are checked. No CUDA toolkit is needed.
//
// What it can't show: what a GPU's weaker memory model allows beyond interleaving; anything in
// inline PTX, whose stand-ins are in device.h; the last bits of the GPU's own arithmetic, such as
// rsqrtf; speed, registers, occupancy (cubin_report.py reads some of that from the machine code).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __constant__
// All of a library's thread-local memory lies in one piece, which the engine swaps from block to
// block: so a plain declaration, also in a template, is one variable for each block.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define ADSC_SIMT_VECTORS(SCALAR, NAME)                                       \
  struct alignas(2 * sizeof(SCALAR)) NAME##2 { SCALAR x, y; };                \
  struct alignas(4 * sizeof(SCALAR) < 16 ? 4 * sizeof(SCALAR) : 16) NAME##4 { \
    SCALAR x, y, z, w;                                                        \
  };                                                                          \
  inline NAME##2 make_##NAME##2(SCALAR x, SCALAR y) { return {x, y}; }        \
  inline NAME##4 make_##NAME##4(SCALAR x, SCALAR y, SCALAR z, SCALAR w) { return {x, y, z, w}; }
ADSC_SIMT_VECTORS(unsigned char, uchar)
ADSC_SIMT_VECTORS(short, short)
ADSC_SIMT_VECTORS(unsigned short, ushort)
ADSC_SIMT_VECTORS(int, int)
ADSC_SIMT_VECTORS(unsigned, uint)
ADSC_SIMT_VECTORS(float, float)
ADSC_SIMT_VECTORS(long long, longlong)
ADSC_SIMT_VECTORS(unsigned long long, ulonglong)
ADSC_SIMT_VECTORS(double, double)
#undef ADSC_SIMT_VECTORS

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace adsc::simt {

using Where = std::source_location;

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();

// The block's barrier; returns how many threads came with a true predicate.
int barrier(bool predicate, Where where);
// All lanes of the mask meet and hand each other 64 bits. values[i] is what lane i brought; lanes
// that have exited, or never were, bring poison. Returns which lanes brought one. With `fence`,
// what was written before is seen after, as of __syncwarp and of no other.
uint32_t meet(uint32_t mask, uint64_t value, uint64_t values[32], bool fence, Where where);
// An access that hooks don't see in the kernel's own code.
void read(void* to, const void* from, size_t bytes);
void write(void* to, const void* from, size_t bytes);
// Called before and after an atomic operation on memory, which is then one step.
void begin_atomic(const void* address, size_t bytes);
void end_atomic();
std::byte* dynamic_shared();
// Ends the launch with an error: what the emulator found, or a kernel's own check.
[[noreturn]] void trap(const char* format, long long a, long long b, long long c, long long d);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(uint32_t mask, T value, int source, Where where) {
  uint64_t values[32];
  meet(mask, to_bits(value), values, false, where);
  return from_bits<T>(values[source & 31]);
}

template <class T, class Update>
T atomic(T* address, Update update) {
  begin_atomic(address, sizeof(T));
  T old;
  std::memcpy(&old, address, sizeof(T));
  const T next = update(old);
  std::memcpy(address, &next, sizeof(T));
  end_atomic();
  return old;
}

}  // namespace adsc::simt

#define threadIdx (::adsc::simt::thread_index())
#define blockIdx (::adsc::simt::block_index())
#define blockDim (::adsc::simt::block_size())
#define gridDim (::adsc::simt::grid_size())
constexpr int warpSize = 32;

inline void __syncthreads(adsc::simt::Where where = adsc::simt::Where::current()) {
  adsc::simt::barrier(false, where);
}
inline int __syncthreads_count(int predicate,
                               adsc::simt::Where where = adsc::simt::Where::current()) {
  return adsc::simt::barrier(predicate != 0, where);
}
inline int __syncthreads_or(int predicate, adsc::simt::Where where = adsc::simt::Where::current()) {
  return adsc::simt::barrier(predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate,
                             adsc::simt::Where where = adsc::simt::Where::current()) {
  return adsc::simt::barrier(predicate == 0, where) == 0;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu,
                       adsc::simt::Where where = adsc::simt::Where::current()) {
  uint64_t values[32];
  adsc::simt::meet(mask, 0, values, true, where);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              adsc::simt::Where where = adsc::simt::Where::current()) {
  const int first = adsc::simt::lane() & ~(width - 1);
  return adsc::simt::shuffle(mask, value, first + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32,
                  adsc::simt::Where where = adsc::simt::Where::current()) {
  const int source = adsc::simt::lane() ^ lanes;
  const int last = adsc::simt::lane() | (width - 1);
  return adsc::simt::shuffle(mask, value, source <= last ? source : adsc::simt::lane(), where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 adsc::simt::Where where = adsc::simt::Where::current()) {
  const int source = adsc::simt::lane() - static_cast<int>(delta);
  const int first = adsc::simt::lane() & ~(width - 1);
  return adsc::simt::shuffle(mask, value, source >= first ? source : adsc::simt::lane(), where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   adsc::simt::Where where = adsc::simt::Where::current()) {
  const int source = adsc::simt::lane() + static_cast<int>(delta);
  const int last = adsc::simt::lane() | (width - 1);
  return adsc::simt::shuffle(mask, value, source <= last ? source : adsc::simt::lane(), where);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              adsc::simt::Where where = adsc::simt::Where::current()) {
  uint64_t values[32];
  const uint32_t present = adsc::simt::meet(mask, predicate != 0, values, false, where);
  uint32_t ballot = 0;
  for (int i = 0; i < 32; ++i) {
    if ((present >> i & 1) != 0 && values[i] != 0) ballot |= 1u << i;
  }
  return ballot;
}
inline int __any_sync(uint32_t mask, int predicate,
                      adsc::simt::Where where = adsc::simt::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate,
                      adsc::simt::Where where = adsc::simt::Where::current()) {
  return __ballot_sync(mask, predicate == 0, where) == 0;
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value,
                          adsc::simt::Where where = adsc::simt::Where::current()) {
  uint64_t values[32];
  const uint32_t present = adsc::simt::meet(mask, adsc::simt::to_bits(value), values, false, where);
  uint32_t same = 0;
  for (int i = 0; i < 32; ++i) {
    if ((present >> i & 1) != 0 && values[i] == adsc::simt::to_bits(value)) same |= 1u << i;
  }
  return same;
}
template <class T, class Combine>
T adsc_simt_reduce(uint32_t mask, T value, Combine combine, adsc::simt::Where where) {
  uint64_t values[32];
  const uint32_t present = adsc::simt::meet(mask, adsc::simt::to_bits(value), values, false, where);
  bool first = true;
  for (int i = 0; i < 32; ++i) {
    if ((present >> i & 1) == 0) continue;
    const T other = adsc::simt::from_bits<T>(values[i]);
    value = first ? other : combine(value, other);
    first = false;
  }
  return value;
}
template <class T>
T __reduce_add_sync(uint32_t mask, T value,
                    adsc::simt::Where where = adsc::simt::Where::current()) {
  return adsc_simt_reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); }, where);
}
template <class T>
T __reduce_min_sync(uint32_t mask, T value,
                    adsc::simt::Where where = adsc::simt::Where::current()) {
  return adsc_simt_reduce(mask, value, [](T a, T b) { return a < b ? a : b; }, where);
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value,
                    adsc::simt::Where where = adsc::simt::Where::current()) {
  return adsc_simt_reduce(mask, value, [](T a, T b) { return a < b ? b : a; }, where);
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return adsc::simt::atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return adsc::simt::atomic(address, [&](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return adsc::simt::atomic(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return adsc::simt::atomic(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return adsc::simt::atomic(address, [&](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return adsc::simt::atomic(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return adsc::simt::atomic(address, [&](T old) { return old == expected ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* address) {
  T value;
  adsc::simt::read(&value, address, sizeof(T));
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) {
  return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits));
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __frsqrt_rn(float value) { return static_cast<float>(1.0 / std::sqrt(double{value})); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __int_as_float(int bits) {
  return adsc::simt::from_bits<float>(static_cast<unsigned>(bits));
}
inline float __uint_as_float(unsigned bits) { return adsc::simt::from_bits<float>(bits); }
inline int __float_as_int(float value) { return static_cast<int>(adsc::simt::to_bits(value)); }
inline unsigned __float_as_uint(float value) {
  return static_cast<unsigned>(adsc::simt::to_bits(value));
}
[[noreturn]] inline void __trap() { adsc::simt::fail("__trap()"); }
