// Whether tensors share memory, told from where they lie and how they step through it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace adsc {

// A tensor in memory. Strides are counted in elements and aren't negative.
struct StridedMemory {
  uintptr_t address;
  int64_t element_bytes;
  const int64_t* sizes;
  const int64_t* strides;
  size_t rank;
};

bool is_empty(const StridedMemory& tensor);

using IndexPair = std::pair<size_t, size_t>;

struct OverlapSearch {
  // The two that share memory; twice the same: two elements of that tensor do.
  std::optional<IndexPair> found;
  int64_t pairs = 0;  // compared element by element, for want of a quicker way
};

// Exact where tensors step through memory alike, as views of one cache do. Otherwise they count as
// apart only if they share their largest stride and keep to different parts of it.
OverlapSearch find_overlap(const std::vector<StridedMemory>& tensors);

// One of `read` and one of `written`, which are apart among themselves.
std::optional<IndexPair> find_shared(const std::vector<StridedMemory>& read,
                                     const std::vector<StridedMemory>& written);

}  // namespace adsc
