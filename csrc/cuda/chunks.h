// What doesn't fit into one launch.
#pragma once

#include <cstddef>
#include <span>

namespace adsc::cuda {

// The first `most` of them, or all.
template <class T>
std::span<const T> up_to(std::span<const T> all, size_t most) {
  return all.first(all.size() < most ? all.size() : most);
}

// Those behind.
template <class T>
std::span<const T> after(std::span<const T> all, size_t most) {
  return all.subspan(all.size() < most ? all.size() : most);
}

}  // namespace adsc::cuda
