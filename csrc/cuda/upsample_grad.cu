#include <cstring>

#include "elements.cuh"
#include "launch.h"
#include "rows.cuh"
#include "upsample_grad.h"

namespace adsc::cuda {
namespace {

constexpr int kGradRows = 8;                 // source rows of a block, at most
constexpr int kList = kThreads * kGradRows;  // takers a block can list: those of one round at least

// The output rows that took one of a block's source rows, in rising order.
struct Takers {
  int64_t output[kList];
  int8_t row[kList];  // which of the block's
  int count;
  int64_t next;  // the first entry of the map that is not in the list
  int32_t warp_sums[kThreads / kWarp];
};

// The takers that one entry of the map, a segment or an index, adds.
struct Found {
  int64_t first;  // output rows first, first + 1, ...
  int32_t count;
};

__device__ __forceinline__ int64_t entries(const RowMap& map) {
  return map.segments != nullptr ? map.num_segments : map.num_tokens;
}

__device__ __forceinline__ Found find(const RowMap& map, int64_t entry, int64_t begin, int count) {
  if (entry >= entries(map)) return {0, 0};
  if (map.segments == nullptr) {
    const int64_t source =
        map.indices64 != nullptr ? load(map.indices64 + entry) : load(map.indices32 + entry);
    return {entry, begin <= source && source < begin + count};
  }
  // Kept rows of the segment below a source row, from those that it moves.
  const Segment segment = map.segments[entry];
  const int64_t next = entry + 1 < map.num_segments ? map.segments[entry + 1].dst : map.num_tokens;
  const int64_t end = segment.first + (next - segment.dst);
  const auto below = [&](int64_t row) {
    const int64_t number =
        kept_before(segment.pattern, row - segment.src, segment.span, segment.keep);
    const int64_t most = number < end ? number : end;
    return most > segment.first ? most : segment.first;
  };
  const int64_t low = below(begin);
  return {segment.dst + (low - segment.first), static_cast<int32_t>(below(begin + count) - low)};
}

// Lists takers of the source rows [begin, begin + count) from entry `from` on, as many as fit.
__device__ __forceinline__ void list_takers(const RowMap& map, int64_t from, int64_t begin,
                                            int count, Takers& takers) {
  int size = 0;
  int64_t entry = from;
  while (entry < entries(map)) {
    const Found found = find(map, entry + threadIdx.x, begin, count);
    int32_t total;
    const int32_t before = sum_before(found.count, takers.warp_sums, total);
    if (size + total > kList) break;  // never in the first round
    for (int32_t i = 0; i < found.count; ++i) {
      const int64_t output = found.first + i;
      const int64_t source = map.segments == nullptr
                                 ? (map.indices64 != nullptr ? load(map.indices64 + output)
                                                             : load(map.indices32 + output))
                                 : source_row(map.segments[entry + threadIdx.x], output);
      takers.output[size + before + i] = output;
      takers.row[size + before + i] = static_cast<int8_t>(source - begin);
    }
    size += total;
    entry += blockDim.x;
  }
  if (threadIdx.x == 0) {
    takers.count = size;
    takers.next = entry;
  }
  __syncthreads();
}

// Four blocks a multiprocessor: of its own accord ptxas aims at five, and spills.
template <class T, class Access>
__global__ void __launch_bounds__(kThreads, 4)
    upsample_grad_kernel(const __grid_constant__ RowMap map,
                         const __grid_constant__ RowScatter scatter, int tile_rows) {
  using Compute = decltype(widen(T{}));
  constexpr int kCount = Elements<T, Access>::kCount;
  __shared__ Takers takers;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile_rows;
  const int64_t left = map.num_rows - begin;
  const int count = static_cast<int>(left < tile_rows ? left : tile_rows);
  const int64_t columns = scatter.row_size / kCount;
  const auto* grad = reinterpret_cast<const Access*>(scatter.grad);
  auto* out = reinterpret_cast<Access*>(scatter.out) + begin * columns;

  // One list nearly always holds all takers; where not, each round makes them anew, in parts.
  bool complete = false;
  // Rounds over all the elements of the block's rows; every thread takes part in each.
  int row = 0;
  int64_t column = threadIdx.x;
  for (int64_t first = 0; first < count * columns; first += blockDim.x, column += blockDim.x) {
    while (column >= columns && row < count) {
      column -= columns;
      ++row;
    }
    Compute sums[kCount] = {};
    Access only{};
    int found = 0;
    int64_t from = 0;
    do {
      if (!complete) list_takers(map, from, begin, count, takers);
      for (int i = 0; i < takers.count; ++i) {
        if (takers.row[i] != row) continue;
        only = load(grad + takers.output[i] * columns + column);
        const auto values = Elements<T, Access>::of(only);
#pragma unroll
        for (int k = 0; k < kCount; ++k) sums[k] += widen(values.values[k]);
        ++found;
      }
      complete = complete || (from == 0 && takers.next >= entries(map));
      from = takers.next;
      if (!complete) __syncthreads();  // before the list is written again
    } while (from < entries(map));
    if (row == count) continue;
    if (found > 1) {
      Elements<T, Access> sum;
#pragma unroll
      for (int k = 0; k < kCount; ++k) narrow(sum.values[k], sums[k]);
      only = sum.access();
    }
    store(out + row * columns + column, only);  // none: zeros; a single one: its bits
  }
}

template <class T, class Access>
void launch_add(const RowMap& map, const RowScatter& scatter, Stream stream) {
  int tile_rows = kGradRows;
  while (tile_rows > 1 && map.num_rows / tile_rows * kThreads < enough_threads()) {
    tile_rows /= 2;
  }
  launch(upsample_grad_kernel<T, Access>, (map.num_rows + tile_rows - 1) / tile_rows, kThreads, 0,
         stream, map, scatter, tile_rows);
}

}  // namespace

void add_rows(const RowMap& map, const RowScatter& scatter, Stream stream) {
  if (scatter.row_size == 0) return;
  const uint64_t addresses =
      reinterpret_cast<uintptr_t>(scatter.grad) | reinterpret_cast<uintptr_t>(scatter.out) |
      static_cast<uint64_t>(scatter.row_size * element_bytes(scatter.element));
  with_element_types(scatter.element, addresses % 16 == 0, [&]<class T, class Access>(T, Access) {
    launch_add<T, Access>(map, scatter, stream);
  });
}

}  // namespace adsc::cuda
