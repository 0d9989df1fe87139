// The tensors of a KV cache, checked: what every compaction of it finds alike.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "compaction.h"
#include "ops/check.h"

namespace adsc::ops {

// What there is to know of one of them.
struct CachePlace {
  uintptr_t address = 0;
  int64_t element_bytes = 0;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  size_t rank = 0;
  std::array<int64_t, 4> sizes{}, strides{};

  bool operator==(const CachePlace&) const = default;

  // Refers to this.
  StridedMemory memory() const;
};

struct Caches {
  std::vector<Tensor> tensors;  // num_layers each: K, V, scales of either
  int64_t num_layers = 1;
  bool heads_first = false;
  std::vector<CachePlace> places;
  int64_t num_blocks = 1;
  int64_t num_tokens = 0;

  const Tensor& first() const { return tensors[0]; }
};

// i: the number of the tensor among caches.
CachePlace place_of(const Tensor& tensor, size_t i);

// Raises where they are not of one shape in blocks and tokens, on one device and apart in memory.
// Those of a kind have a dtype and a rank of their own; scales may lack dimensions.
Caches caches_of(const std::vector<Tensor>& tensors, int64_t num_layers,
                 const std::string& cache_layout);

// Those that hold anything, as they are moved. index_heads: how many heads keep rows of their own.
std::vector<CacheTensor> cache_tensors(const Caches& caches, int32_t index_heads);

// What the op keep_caches keeps by this number, so that a call needs no list of 64 tensors. Raises
// where there is nothing, or a tensor is no longer what it was.
std::shared_ptr<const Caches> kept_caches(int64_t number);

}  // namespace adsc::ops
