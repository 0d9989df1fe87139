#include "overlap.h"

#include <algorithm>
#include <array>
#include <map>
#include <span>

namespace adsc {
namespace {

struct Extent {
  uintptr_t begin, end;  // bytes; end lies behind the last
  size_t index;          // of the tensor
};

Extent extent_of(const StridedMemory& x, size_t index) {
  int64_t last = 0;
  for (size_t d = 0; d < x.rank; ++d) last += (x.sizes[d] - 1) * x.strides[d];
  return {x.address, x.address + (last + 1) * x.element_bytes, index};
}

std::vector<Extent> extents_of(const std::vector<StridedMemory>& tensors) {
  std::vector<Extent> extents;
  extents.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!is_empty(tensors[i])) extents.push_back(extent_of(tensors[i], i));
  }
  return extents;
}

// Whether two elements of x share memory.
bool folds(const StridedMemory& x) {
  std::array<std::pair<int64_t, int64_t>, 8> few;
  std::vector<std::pair<int64_t, int64_t>> many(x.rank > few.size() ? x.rank : 0);
  auto* dimensions = many.empty() ? few.data() : many.data();
  size_t count = 0;
  for (size_t d = 0; d < x.rank; ++d) {
    if (x.sizes[d] > 1) dimensions[count++] = {x.strides[d], x.sizes[d]};
  }
  std::sort(dimensions, dimensions + count);
  int64_t extent = 1;
  for (size_t i = 0; i < count; ++i) {
    const auto [stride, size] = dimensions[i];
    if (stride < extent) return true;
    extent += (size - 1) * stride;
  }
  return false;
}

// How many times each distance in bytes is stepped, largest first; the bytes of a row are steps
// of one.
std::map<int64_t, int64_t, std::greater<>> steps_of(const StridedMemory& x) {
  std::map<int64_t, int64_t, std::greater<>> steps;
  const int64_t width = x.element_bytes;
  int64_t inner = 1;
  for (size_t d = 0; d < x.rank; ++d) {
    if (x.sizes[d] == 1 || x.strides[d] == 0) continue;
    if (x.strides[d] == 1) {
      inner += x.sizes[d] - 1;
      continue;
    }
    const auto [step, is_new] = steps.try_emplace(x.strides[d] * width, x.sizes[d]);
    if (!is_new) step->second += x.sizes[d] - 1;
  }
  steps[1] = inner * width;
  return steps;
}

// Whether some a's index less some b's, times the steps, make up `left`.
struct Level {
  int64_t step, most_a, most_b;
};

bool meets(std::span<const Level> levels, int64_t left) {
  if (levels.empty()) return left == 0;
  const auto [step, most_a, most_b] = levels[0];
  int64_t high = 0, low = 0;
  for (const Level& below : levels.subspan(1)) {
    high += below.most_a * below.step;
    low -= below.most_b * below.step;
  }
  const auto floor = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
  const int64_t least = std::max(-floor(high - left, step), -most_b);
  const int64_t most = std::min(floor(left - low, step), most_a);
  for (int64_t i = least; i <= most; ++i) {
    if (meets(levels.subspan(1), left - i * step)) return true;
  }
  return false;
}

// Whether they meet, where b begins `offset` bytes behind a.
bool share_memory(const StridedMemory& a, const StridedMemory& b, int64_t offset) {
  const auto steps_a = steps_of(a), steps_b = steps_of(b);
  std::map<int64_t, Level, std::greater<>> both;
  for (const auto& [step, size] : steps_a) both[step] = {step, size - 1, 0};
  for (const auto& [step, size] : steps_b) {
    both.try_emplace(step, Level{step, 0, 0}).first->second.most_b = size - 1;
  }
  const int64_t outer = both.begin()->first;
  int64_t rest_a = 0, rest_b = 0;
  std::vector<Level> levels;
  for (const auto& [step, level] : both) {
    levels.push_back(level);
    if (step == outer) continue;
    rest_a += level.most_a * step;
    rest_b += level.most_b * step;
  }
  const int64_t place = offset % outer;
  if (rest_a < place && place + rest_b < outer) return false;
  return meets(levels, offset);
}

bool share_memory(const std::vector<StridedMemory>& tensors, const Extent& a,
                  const std::vector<StridedMemory>& others, const Extent& b) {
  if (a.begin >= b.end || b.begin >= a.end) return false;
  if (a.begin <= b.begin) {
    return share_memory(tensors[a.index], others[b.index], b.begin - a.begin);
  }
  return share_memory(others[b.index], tensors[a.index], a.begin - b.begin);
}

// A distance that is stepped, and the bytes from the first to behind the last that lie within.
struct Step {
  int64_t step, extent;
};

// What of a tensor's addresses is still to be told from others'.
struct Part {
  uintptr_t begin;             // from the same place for all parts
  std::span<const Step> form;  // largest first; at the end the bytes of a row, stepped by one
  const Extent* whole;
};

class Search {
 public:
  explicit Search(const std::vector<StridedMemory>& tensors) : tensors_(tensors) {}

  OverlapSearch run(std::vector<Extent> extents) {
    std::stable_sort(extents.begin(), extents.end(),
                     [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    const auto crossed =
        std::adjacent_find(extents.begin(), extents.end(),
                           [](const Extent& a, const Extent& b) { return b.begin < a.end; });
    if (crossed == extents.end()) return result_;
    std::vector<Part> parts;
    forms_.reserve(extents.size());
    for (const Extent& extent : extents) {
      parts.push_back({extent.begin, form_of(tensors_[extent.index]), &extent});
    }
    search(parts);
    return result_;
  }

 private:
  std::span<const Step> form_of(const StridedMemory& x) {
    std::vector<Step>& form = forms_.emplace_back();
    const auto steps = steps_of(x);
    int64_t extent = 0;
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
      extent += step->first == 1 ? step->second : (step->second - 1) * step->first;
      form.push_back({step->first, extent});
    }
    std::reverse(form.begin(), form.end());
    return form;
  }

  // Splits parts where no extent reaches across; what still hangs together is looked into.
  void search(std::vector<Part>& parts) {
    std::stable_sort(parts.begin(), parts.end(),
                     [](const Part& a, const Part& b) { return a.begin < b.begin; });
    uintptr_t end = 0;
    size_t first = 0;
    for (size_t i = 0; i < parts.size() && !result_.found; ++i) {
      if (parts[i].begin >= end) {
        search_chain(std::span(parts).subspan(first, i - first));
        first = i;
      }
      end = std::max<uintptr_t>(end, parts[i].begin + parts[i].form[0].extent);
    }
    if (!result_.found) search_chain(std::span(parts).subspan(first));
  }

  // Tells parts by their places within the largest distance that any of them steps, such as K and
  // V of all layers within a page: those that lie apart there are apart. It takes a sort for each
  // such distance; only where a part lies across two places are all pairs compared.
  void search_chain(std::span<const Part> chain) {
    if (chain.size() < 2) return;
    int64_t outer = 1;
    for (const Part& part : chain) outer = std::max(outer, part.form[0].step);
    std::vector<Part> inner;
    for (const Part& part : chain) {
      const bool steps = outer > 1 && part.form[0].step == outer;  // a run of bytes stays one
      const auto below = steps ? part.form.subspan(1) : part.form;
      const auto place = static_cast<int64_t>((part.begin - chain[0].begin) % outer);
      if (outer == 1 || place + below[0].extent > outer) return compare(chain);
      inner.push_back({static_cast<uintptr_t>(place), below, part.whole});
    }
    search(inner);
  }

  void compare(std::span<const Part> chain) {
    for (size_t i = 0; i < chain.size(); ++i) {
      for (size_t j = i + 1; j < chain.size(); ++j) {
        const Extent &a = *chain[i].whole, &b = *chain[j].whole;
        ++result_.pairs;
        if (share_memory(tensors_, a, tensors_, b)) {
          result_.found =
              a.begin <= b.begin ? IndexPair{a.index, b.index} : IndexPair{b.index, a.index};
          return;
        }
      }
    }
  }

  const std::vector<StridedMemory>& tensors_;
  std::vector<std::vector<Step>> forms_;
  OverlapSearch result_;
};

}  // namespace

bool is_empty(const StridedMemory& tensor) {
  const int64_t* end = tensor.sizes + tensor.rank;
  return std::find(tensor.sizes, end, 0) != end;
}

OverlapSearch find_overlap(const std::vector<StridedMemory>& tensors) {
  const std::vector<Extent> extents = extents_of(tensors);
  for (const Extent& extent : extents) {
    if (folds(tensors[extent.index])) return {.found = IndexPair{extent.index, extent.index}};
  }
  return Search(tensors).run(extents);
}

std::optional<IndexPair> find_shared(const std::vector<StridedMemory>& read,
                                     const std::vector<StridedMemory>& written) {
  const std::vector<Extent> inputs = extents_of(read), outputs = extents_of(written);
  for (const Extent& a : inputs) {
    for (const Extent& b : outputs) {
      if (share_memory(read, a, written, b)) return IndexPair{a.index, b.index};
    }
  }
  return std::nullopt;
}

}  // namespace adsc
