#include "ops/caches.h"

#include <algorithm>
#include <limits>

namespace adsc::ops {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// Where the dimensions of a tensor are; -1: it has none of that name.
struct Axes {
  int64_t block, token, head, last;
};

// own: the rank of a tensor; rank: that of the caches. Scales may lack the last dimension, or that
// and the heads.
Axes axes_of(size_t own, size_t rank, bool heads_first) {
  const int64_t first = rank == 4 ? 1 : 0;
  if (own + 2 == rank) return {first - 1, first, -1, -1};
  return {first - 1, first + heads_first, first + !heads_first, own == rank ? first + 2 : -1};
}

int64_t size(const CachePlace& x, int64_t axis) { return axis < 0 ? 1 : x.sizes[axis]; }

void check_apart(const Caches& caches) {
  std::vector<StridedMemory> memory;
  memory.reserve(caches.places.size());
  for (const CachePlace& place : caches.places) memory.push_back(place.memory());
  const auto found = find_overlap(memory).found;
  if (!found.has_value()) return;
  const auto [i, j] = *found;
  check(i != j, "caches[", i, "]: expected elements that don't share memory, got shape ",
        Shape{caches.tensors[i]}, " with other strides");
  check(false, "caches[", i, "], caches[", j, "]: expected tensors that don't share memory");
}

// x: not empty.
CacheTensor cache_tensor(const CachePlace& x, size_t i, const Axes& axes, int32_t index_heads) {
  const auto stride = [&](int64_t axis) {
    return axis < 0 ? 0 : x.strides[axis] * x.element_bytes;
  };
  const int64_t heads = size(x, axes.head);
  int64_t line_bytes = size(x, axes.last) * x.element_bytes;
  int64_t lines = heads;
  // Heads that lie behind one another are one line, unless each keeps rows of its own.
  if (index_heads == 1 && (heads == 1 || stride(axes.head) == line_bytes)) {
    line_bytes *= heads;
    lines = 1;
  }
  check(line_bytes <= kMost && lines <= kMost, "caches[", i, "]: expected rows below 2^31 bytes");
  check(index_heads == 1 || (axes.head >= 0 && heads == index_heads),
        "keep_indices: expected 1 or ", heads, " heads, as in caches[", i, "], got ", index_heads);
  return {.base = reinterpret_cast<std::byte*>(x.address),
          .block_stride = stride(axes.block),
          .token_stride = stride(axes.token),
          .line_stride = stride(axes.head),
          .line_bytes = static_cast<int32_t>(line_bytes),
          .num_lines = static_cast<int32_t>(lines),
          .layer = 0};
}

}  // namespace

StridedMemory CachePlace::memory() const {
  return {.address = address,
          .element_bytes = element_bytes,
          .sizes = sizes.data(),
          .strides = strides.data(),
          .rank = rank};
}

CachePlace place_of(const Tensor& tensor, size_t i) {
  const AtenTensorHandle handle = tensor.get();
  CachePlace place;
  int64_t rank, *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &rank));
  check(rank <= 4, "caches[", i, "]: expected at most 4 dimensions, got shape ", Shape{tensor});
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  place.rank = static_cast<size_t>(rank);
  std::copy_n(sizes, rank, place.sizes.begin());
  std::copy_n(strides, rank, place.strides.begin());
  place.address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  place.element_bytes = static_cast<int64_t>(tensor.element_size());
  place.dtype = dtype_of(tensor);
  place.device_type = device_type_of(tensor);
  place.device_index = tensor.get_device_index();
  return place;
}

Caches caches_of(const std::vector<Tensor>& tensors, int64_t num_layers,
                 const std::string& cache_layout) {
  check(!tensors.empty(), "caches: expected at least one tensor, got none");
  const Tensor& first = tensors[0];
  check(first.dim() == 3 || first.dim() == 4, "caches[0]: expected 3 or 4 dimensions, got shape ",
        Shape{first});
  check(cache_layout == "NHD" || cache_layout == "HND", "cache_layout: expected NHD or HND, got ",
        cache_layout);
  check(num_layers >= 1 && static_cast<int64_t>(tensors.size()) % num_layers == 0,
        "num_layers: expected a divisor of the ", tensors.size(), " caches, got ", num_layers);
  Caches caches;
  caches.tensors = tensors;
  caches.num_layers = num_layers;
  caches.heads_first = cache_layout == "HND";
  const auto rank = static_cast<size_t>(first.dim());
  const Axes axes = axes_of(rank, rank, caches.heads_first);
  caches.num_blocks = axes.block < 0 ? 1 : first.size(axes.block);
  caches.num_tokens = first.size(axes.token);
  check(caches.num_tokens <= kMost || rank == 3, "caches[0]: expected below 2^31 tokens a block");
  check_devices(tensors, "caches", first, "caches[0]");
  caches.places.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const CachePlace& x = caches.places.emplace_back(place_of(tensors[i], i));
    const size_t kind = i - i % static_cast<size_t>(num_layers);  // where it begins
    check(x.dtype == caches.places[kind].dtype && x.rank == caches.places[kind].rank, "caches[", i,
          "]: expected dtype and dimensions of caches[", kind, "], got others");
    check(x.rank <= rank && x.rank + 2 >= rank, "caches[", i, "]: expected ", rank - 2, " to ",
          rank, " dimensions, got shape ", Shape{tensors[i]});
    const Axes own = axes_of(x.rank, rank, caches.heads_first);
    check(size(x, own.block) == caches.num_blocks && size(x, own.token) == caches.num_tokens,
          "caches[", i, "]: expected ", caches.num_blocks, " blocks of ", caches.num_tokens,
          " tokens, as caches[0], got shape ", Shape{tensors[i]});
    check(size(x, own.last) == 1 || x.strides[own.last] == 1 || is_empty(x.memory()), "caches[", i,
          "]: expected unit stride on the last dimension, got stride ",
          own.last < 0 ? 0 : x.strides[own.last]);
  }
  check_apart(caches);
  return caches;
}

std::vector<CacheTensor> cache_tensors(const Caches& caches, int32_t index_heads) {
  const size_t rank = caches.places[0].rank;
  std::vector<CacheTensor> tensors;
  tensors.reserve(caches.places.size());
  int32_t layer = 0;
  for (size_t i = 0; i < caches.places.size(); ++i) {
    const CachePlace& x = caches.places[i];
    if (!is_empty(x.memory())) {
      const Axes axes = axes_of(x.rank, rank, caches.heads_first);
      tensors.push_back(cache_tensor(x, i, axes, index_heads));
      tensors.back().layer = layer;
    }
    layer = layer + 1 == caches.num_layers ? 0 : layer + 1;
  }
  return tensors;
}

}  // namespace adsc::ops
