// In place of csrc/cuda/device.cuh.
#pragma once

#include "simt.h"

namespace adsc::cuda {

template <class T>
T load(const T* address) {
  T value;
  simt::read(&value, address, sizeof(T));
  return value;
}

template <class T>
void store(T* address, const T& value) {
  simt::write(address, &value, sizeof(T));
}

template <class T>
T packed(T value) {
  return value;
}

[[noreturn]] inline void trap(const char* what, long long a = 0, long long b = 0, long long c = 0,
                              long long d = 0) {
  simt::trap(what, a, b, c, d);
}

}  // namespace adsc::cuda
