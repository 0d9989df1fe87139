#include "upsample_grad.h"

#include <algorithm>
#include <cstring>

namespace adsc::cpu {
namespace {

template <class T>
void add_rows_of(const Takers& takers, const RowScatter& scatter, int64_t begin, int64_t end) {
  using Sum = decltype(widen(T{}));
  const T* grad = reinterpret_cast<const T*>(scatter.grad);
  const int64_t size = scatter.row_size;
  for (int64_t row = begin; row < end; ++row) {
    T* out = reinterpret_cast<T*>(scatter.out) + row * size;
    const int64_t first = takers.starts[row];
    const int64_t last = takers.starts[row + 1];
    if (first == last) {
      std::memset(out, 0, size * sizeof(T));
      continue;
    }
    if (last - first == 1) {
      std::memcpy(out, grad + takers.rows[first] * size, size * sizeof(T));
      continue;
    }
    constexpr int64_t kBlock = 256;
    for (int64_t column = 0; column < size; column += kBlock) {
      const int64_t width = std::min(kBlock, size - column);
      Sum sums[kBlock] = {};
      for (int64_t taker = first; taker < last; ++taker) {
        const T* taken = grad + takers.rows[taker] * size + column;
        for (int64_t i = 0; i < width; ++i) sums[i] += widen(taken[i]);
      }
      for (int64_t i = 0; i < width; ++i) narrow(out[column + i], sums[i]);
    }
  }
}

}  // namespace

Takers find_takers(const RowMap& map) {
  Takers takers;
  takers.starts.assign(map.num_rows + 1, 0);
  takers.rows.resize(map.num_tokens);
  for_each_run(map, 0, map.num_tokens, [&](int64_t, int64_t source, int64_t count) {
    for (int64_t i = 0; i < count; ++i) ++takers.starts[source + i + 1];
  });
  for (int64_t row = 0; row < map.num_rows; ++row) takers.starts[row + 1] += takers.starts[row];
  std::vector<int64_t> next(takers.starts.begin(), takers.starts.end() - 1);
  for_each_run(map, 0, map.num_tokens, [&](int64_t row, int64_t source, int64_t count) {
    for (int64_t i = 0; i < count; ++i) takers.rows[next[source + i]++] = row + i;
  });
  return takers;
}

void add_rows(const Takers& takers, const RowScatter& scatter, int64_t begin, int64_t end) {
  switch (scatter.element) {
    case Element::kFloat:
      return add_rows_of<float>(takers, scatter, begin, end);
    case Element::kDouble:
      return add_rows_of<double>(takers, scatter, begin, end);
    case Element::kBFloat16:
      return add_rows_of<BFloat16>(takers, scatter, begin, end);
    case Element::kHalf:
      return add_rows_of<Half>(takers, scatter, begin, end);
  }
}

}  // namespace adsc::cpu
