// What a kernel may touch: checked at each of its loads and stores.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adsc::simt {

// Global memory that kernels may read and, if `writable`, write. Once any is named, all other is an
// error. `initialized`: holds values; else reading a byte before a kernel wrote it is one too.
void allow(const void* begin, size_t bytes, bool writable, bool initialized);
void allow_anything();

// Forgets who touched what: a new launch, which may read what those before it wrote; a new block in
// a slot.
void settle_global();
void forget_shared(int slot);

}  // namespace adsc::simt
