#include "downsample.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstring>

#include "copy.h"

namespace adsc::cpu {
namespace {

// New memory comes from the kernel page by page, each zeroed when it is first written, which takes
// longer than the copy itself. Large pages halve that, and here every byte of them is about to be
// written. Memory that is mapped already stays as it is.
void ask_for_large_pages(std::byte* out, int64_t size) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kPage = 2 << 20;
  if (size < 4 * kPage) return;
  const auto first = (reinterpret_cast<uintptr_t>(out) + kPage - 1) / kPage;
  const auto end = (reinterpret_cast<uintptr_t>(out) + size) / kPage;
  madvise(reinterpret_cast<void*>(first * kPage), (end - first) * kPage, MADV_HUGEPAGE);
#endif
}

// kRowBytes: the row's size where that is a single load and store, else 0.
template <int64_t kRowBytes>
void copy_rows_of(const RowMap& map, const RowCopy& copy, int64_t begin, int64_t end) {
  const int64_t row_bytes = kRowBytes != 0 ? kRowBytes : copy.row_bytes;
  for_each_run(map, begin, end, [=](int64_t row, int64_t source, int64_t count) {
    std::byte* out = copy.out + row * row_bytes;
    const std::byte* x = copy.x + source * copy.stride;
    if (count > 1 && copy.stride == row_bytes) {
      copy_bytes(out, x, count * row_bytes);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kRowBytes != 0) {
        std::memcpy(out + i * row_bytes, x + i * copy.stride, row_bytes);
      } else {
        copy_bytes(out + i * row_bytes, x + i * copy.stride, row_bytes);
      }
    }
  });
}

}  // namespace

void copy_rows(const RowMap& map, const RowCopy& copy, int64_t begin, int64_t end) {
  ask_for_large_pages(copy.out + begin * copy.row_bytes, (end - begin) * copy.row_bytes);
  switch (copy.row_bytes) {
    case 0:
      return;
    case 1:
      return copy_rows_of<1>(map, copy, begin, end);
    case 2:
      return copy_rows_of<2>(map, copy, begin, end);
    case 4:
      return copy_rows_of<4>(map, copy, begin, end);
    case 8:
      return copy_rows_of<8>(map, copy, begin, end);
    case 16:
      return copy_rows_of<16>(map, copy, begin, end);
    default:
      return copy_rows_of<0>(map, copy, begin, end);
  }
}

}  // namespace adsc::cpu
