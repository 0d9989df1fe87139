// The element types the kernels compute with. The two 16-bit floats are bits, taken to and from
// float with rounding to nearest even: on a CPU by integer arithmetic that every compiler can
// vectorize, on a GPU by its own instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace adsc {

enum class Element { kFloat, kDouble, kBFloat16, kHalf };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

ADSC_HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ADSC_HOST_DEVICE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ADSC_HOST_DEVICE float widen(float value) { return value; }
ADSC_HOST_DEVICE double widen(double value) { return value; }
ADSC_HOST_DEVICE float widen(BFloat16 value) { return bits_float(uint32_t{value.bits} << 16); }

// The float's exponent is the half's plus 112. A subnormal half is an integer times 2^-24, which
// setting an exponent of 113 and taking 2^-14 away again computes exactly.
ADSC_HOST_DEVICE float widen(Half value) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
  const uint32_t shifted = (value.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t special = shifted + (224u << 23);  // infinity, nan
  const uint32_t subnormal =
      float_bits(bits_float(shifted + (113u << 23)) - bits_float(113u << 23));
  const uint32_t magnitude = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : normal;
  return bits_float(magnitude | sign);
#endif
}

ADSC_HOST_DEVICE void narrow(float& out, float value) { out = value; }
ADSC_HOST_DEVICE void narrow(double& out, double value) { out = value; }

ADSC_HOST_DEVICE void narrow(BFloat16& out, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
#endif
}

// Below the smallest normal half, adding 0.5 lets the float unit round to a multiple of 2^-24.
ADSC_HOST_DEVICE void narrow(Half& out, float value) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // nan, else infinity
  const uint32_t half = magnitude >= 0x47800000u  ? special              // 2^16 and above
                        : magnitude < 0x38800000u ? subnormal            // below 2^-14
                                                  : normal;
  out.bits = static_cast<uint16_t>(half | sign);
#endif
}

}  // namespace adsc
