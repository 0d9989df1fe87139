// What doesn't fit into one launch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

namespace adsc::cuda {

// The first `most` of them, or all.
template <class T>
std::span<const T> up_to(std::span<const T> all, size_t most) {
  return all.first(std::min(all.size(), most));
}

// Those behind.
template <class T>
std::span<const T> after(std::span<const T> all, size_t most) {
  return all.subspan(std::min(all.size(), most));
}

}  // namespace adsc::cuda
