// Element types and the accesses that carry them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../element.h"
#include "device.cuh"

namespace adsc::cuda {

inline int64_t element_bytes(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

// The elements of one access.
template <class T, class Access>
struct Elements {
  static constexpr int kCount = sizeof(Access) / sizeof(T);
  T values[kCount];

  __device__ __forceinline__ static Elements of(const Access& access) {
    Elements elements;
    memcpy(&elements, &access, sizeof access);
    return elements;
  }
  __device__ __forceinline__ Access access() const {
    Access access;
    memcpy(&access, this, sizeof access);
    return access;
  }
};

// Calls body(T{}, Access{}) with the element type and what a thread moves at once: 16 bytes if
// wide, else one element.
template <class Body>
void with_element_types(Element element, bool wide, const Body& body) {
  switch (element) {
    case Element::kFloat:
      return wide ? body(float{}, uint4{}) : body(float{}, uint32_t{});
    case Element::kDouble:
      return wide ? body(double{}, uint4{}) : body(double{}, uint2{});
    case Element::kBFloat16:
      return wide ? body(BFloat16{}, uint4{}) : body(BFloat16{}, uint16_t{});
    case Element::kHalf:
      return wide ? body(Half{}, uint4{}) : body(Half{}, uint16_t{});
  }
}

// Calls body(Access{}) with what a thread moves at once: 16, 8, 4, 2 or 1 bytes.
template <class Body>
__device__ __forceinline__ void with_access(int bytes, const Body& body) {
  switch (bytes) {
    case 16:
      return body(uint4{});
    case 8:
      return body(uint2{});
    case 4:
      return body(uint32_t{});
    case 2:
      return body(uint16_t{});
    default:
      return body(uint8_t{});
  }
}

}  // namespace adsc::cuda
