#include "downsample_add_rms_norm.h"

#include <algorithm>
#include <cmath>

// Code for several instruction sets in one binary, picked when it is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define ADSC_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define ADSC_INLINE inline __attribute__((always_inline))
#else
#define ADSC_SIMD
#define ADSC_INLINE inline
#endif

namespace adsc::cpu {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kLanes = 32;

// Squares are summed in the compute type over a block (running sums, then a tree of them), and
// blocks in double: the error hardly grows with the width.
template <class T>
ADSC_INLINE void add_rms_norm_row(const T* x, const T* residual, const T* weight, T* normed,
                                  T* residual_out, int64_t width, double eps) {
  using Compute = decltype(widen(T{}));
  double squares = 0;
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t size = std::min(kBlock, width - start);
    Compute sums[kBlock] = {};
    for (int64_t i = 0; i < size; ++i) {
      T sum;
      narrow(sum, widen(x[start + i]) + widen(residual[start + i]));
      residual_out[start + i] = sum;
      sums[i] = widen(sum);
    }
    Compute lanes[kLanes] = {};
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += sums[i + lane] * sums[i + lane];
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    squares += lanes[0];
  }
  const auto scale =
      static_cast<Compute>(1 / std::sqrt(squares / static_cast<double>(width) + eps));
  for (int64_t i = 0; i < width; ++i) {
    narrow(normed[i], widen(residual_out[i]) * scale * widen(weight[i]));
  }
}

#define ADSC_ROW(NAME, TYPE)                                                                 \
  ADSC_SIMD void NAME(const TYPE* x, const TYPE* residual, const TYPE* weight, TYPE* normed, \
                      TYPE* residual_out, int64_t width, double eps) {                       \
    add_rms_norm_row<TYPE>(x, residual, weight, normed, residual_out, width, eps);           \
  }
ADSC_ROW(row_float, float)
ADSC_ROW(row_double, double)
ADSC_ROW(row_bfloat16, BFloat16)
ADSC_ROW(row_half, Half)
#undef ADSC_ROW

template <class T, class Row>
void run(const RowMap& map, const RowNorm& norm, int64_t begin, int64_t end, Row* one_row) {
  const auto* weight = reinterpret_cast<const T*>(norm.weight);
  auto* normed = reinterpret_cast<T*>(norm.normed);
  auto* residual_out = reinterpret_cast<T*>(norm.residual_out);
  for_each_run(map, begin, end, [&](int64_t row, int64_t source, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      one_row(reinterpret_cast<const T*>(norm.x + (source + i) * norm.x_stride),
              reinterpret_cast<const T*>(norm.residual + (source + i) * norm.residual_stride),
              weight, normed + (row + i) * norm.width, residual_out + (row + i) * norm.width,
              norm.width, norm.eps);
    }
  });
}

}  // namespace

void add_rms_norm_rows(const RowMap& map, const RowNorm& norm, int64_t begin, int64_t end) {
  if (norm.width == 0) return;
  switch (norm.element) {
    case Element::kFloat:
      return run<float>(map, norm, begin, end, row_float);
    case Element::kDouble:
      return run<double>(map, norm, begin, end, row_double);
    case Element::kBFloat16:
      return run<BFloat16>(map, norm, begin, end, row_bfloat16);
    case Element::kHalf:
      return run<Half>(map, norm, begin, end, row_half);
  }
}

}  // namespace adsc::cpu
