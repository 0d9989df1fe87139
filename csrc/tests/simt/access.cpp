#include "access.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"

namespace adsc::simt {
namespace {

struct Byte {
  Touch writer;
  Touch reader;
  bool atomic = false;   // the last write was
  bool settled = false;  // an earlier launch wrote it
};

constexpr uintptr_t kGranule = 16;
using Bytes = std::array<Byte, kGranule>;
using Shadow = std::unordered_map<uintptr_t, Bytes>;

struct Range {
  uintptr_t end;
  bool writable;
  bool initialized;
};

struct Checks {
  std::map<uintptr_t, Range> ranges;  // by where they begin
  Shadow global;
  std::vector<Shadow> shared;  // by slot
};

Checks& checks() {
  static Checks value;
  return value;
}

enum class Kind { kRead, kWrite, kAtomic };

const char* name(Kind kind) {
  return kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic operation";
}

bool inside(uintptr_t begin, uintptr_t end, uintptr_t low, uintptr_t high) {
  return low <= begin && end <= high;
}

// kMixed: of several.
uint32_t warp(const Touch& touch) {
  if (touch.thread == Touch::kMixed) return Touch::kMixed;
  return touch.thread >= Touch::kWarp ? touch.thread - Touch::kWarp : touch.thread / 32;
}

// Whether what `before` did comes before what the running thread does now, in every schedule.
bool ordered(const Touch& before, const Touch& now) {
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.barriers < now.barriers) return true;
  return warp(before) == warp(now) && before.fences < now.fences;
}

std::string words(const Touch& touch) {
  if (touch.block == Touch::kMixed) return "threads of several blocks";
  const std::string block = "block " + std::to_string(touch.block);
  if (touch.thread >= Touch::kWarp) return "several threads of " + block;
  return block + " thread " + std::to_string(touch.thread);
}

[[noreturn]] void race(Kind kind, uintptr_t address, const char* space, const Touch& other,
                       const char* what) {
  fail("race: %s of %s %p, which %s %s, with nothing in between that orders them", name(kind),
       space, reinterpret_cast<void*>(address), words(other).c_str(), what);
}

void note_read(Touch& reader, const Touch& now) {
  if (reader.block == Touch::kNobody || ordered(reader, now)) {
    reader = now;
  } else if (reader.block != now.block) {
    reader.block = Touch::kMixed;
  } else {
    reader.thread = warp(reader) == warp(now) ? Touch::kWarp + warp(now) : Touch::kMixed;
    reader.barriers = now.barriers;
    reader.fences = std::max(reader.fences, now.fences);
  }
}

void check_bytes(Shadow& shadow, uintptr_t begin, uintptr_t end, Kind kind, const char* space,
                 bool initialized) {
  const Touch now = running.self;
  const bool races = options().races;
  uintptr_t at = begin;
  while (at < end) {
    Bytes& bytes = shadow[at / kGranule];
    const uintptr_t stop = std::min(end, (at / kGranule + 1) * kGranule);
    for (; at < stop; ++at) {
      Byte& byte = bytes[at % kGranule];
      const bool written = byte.writer.block != Touch::kNobody;
      if (kind != Kind::kWrite && !written && !byte.settled && !initialized) {
        fail("%s of %s %p, which nothing has written", name(kind), space,
             reinterpret_cast<void*>(at));
      }
      if (races && written && !(kind == Kind::kAtomic && byte.atomic) &&
          !ordered(byte.writer, now)) {
        race(kind, at, space, byte.writer, "wrote");
      }
      if (kind == Kind::kRead) {
        note_read(byte.reader, now);
        continue;
      }
      if (races && byte.reader.block != Touch::kNobody && !ordered(byte.reader, now)) {
        race(kind, at, space, byte.reader, "read");
      }
      byte.writer = now;
      byte.reader = {};
      byte.atomic = kind == Kind::kAtomic;
    }
  }
}

void check_global(uintptr_t begin, uintptr_t end, Kind kind) {
  const auto& ranges = checks().ranges;
  bool initialized = true;
  if (!ranges.empty()) {
    auto next = ranges.upper_bound(begin);
    const auto range = next == ranges.begin() ? ranges.end() : std::prev(next);
    if (range == ranges.end() || end > range->second.end) {
      char hint[96] = "";
      const bool after = range != ranges.end() && begin < range->second.end + (1 << 20);
      // The nearer of two buffers: an allocator puts them in any order.
      if (after && (next == ranges.end() ||
                    begin < range->second.end + (next->first - range->second.end) / 2)) {
        std::snprintf(hint, sizeof hint, ", %+td bytes from the end of a buffer of %zu",
                      static_cast<ptrdiff_t>(begin - range->second.end),
                      static_cast<size_t>(range->second.end - range->first));
      } else if (next != ranges.end()) {
        std::snprintf(hint, sizeof hint, ", %zu bytes before a buffer",
                      static_cast<size_t>(next->first - begin));
      }
      fail("out of bounds: %s of %zu bytes at %p%s", name(kind), static_cast<size_t>(end - begin),
           reinterpret_cast<void*>(begin), hint);
    }
    if (kind != Kind::kRead && !range->second.writable) {
      fail("%s of %zu bytes at %p, in a buffer that is only to be read", name(kind),
           static_cast<size_t>(end - begin), reinterpret_cast<void*>(begin));
    }
    initialized = range->second.initialized;
  }
  check_bytes(checks().global, begin, end, kind, "global memory", initialized);
}

// alignment: what the access needs; 1 where the compiler counts on nothing.
void check(const void* address, size_t size, Kind kind, size_t alignment) {
  if (!running.active) return;
  running.active = false;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const uintptr_t end = begin + size;
  if (inside(begin, end, running.stack_begin, running.stack_end) ||
      (kind == Kind::kRead && inside(begin, end, running.arguments_begin, running.arguments_end))) {
    running.active = true;
    return;
  }
  if (inside(begin, end, running.all_stacks_begin, running.all_stacks_end)) {
    fail("%s of the local memory of another thread", name(kind));
  }
  give_way();
  if (begin % alignment != 0) {
    fail("misaligned: %s of %zu bytes at %p", name(kind), size, address);
  }
  if (inside(begin, end, running.static_begin, running.static_end)) {
    running.touched_begin = std::min(running.touched_begin, begin);
    running.touched_end = std::max(running.touched_end, end);
    check_bytes(checks().shared[running.slot], begin, end, kind, "shared memory", false);
  } else if (inside(begin, end, running.all_dynamic_begin, running.all_dynamic_end)) {
    if (!inside(begin, end, running.dynamic_begin, running.dynamic_end)) {
      fail("out of bounds: %s of %zu bytes, %+td from the end of dynamic shared memory", name(kind),
           size, static_cast<ptrdiff_t>(begin - running.dynamic_end));
    }
    check_bytes(checks().shared[running.slot], begin, end, kind, "dynamic shared memory", false);
  } else {
    check_global(begin, end, kind);
  }
  running.active = true;
}

}  // namespace

void allow(const void* begin, size_t bytes, bool writable, bool initialized) {
  if (bytes == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  checks().ranges[address] = {address + bytes, writable, initialized};
  if (initialized) return;
  for (uintptr_t at = address; at < address + bytes; ++at) {  // it may have been another output's
    const auto found = checks().global.find(at / kGranule);
    if (found != checks().global.end()) found->second[at % kGranule] = {};
  }
}

void allow_anything() {
  checks().ranges.clear();
  checks().global.clear();
}

void settle_global() {
  for (auto& [granule, bytes] : checks().global) {
    for (Byte& byte : bytes) {
      const bool written = byte.settled || byte.writer.block != Touch::kNobody;
      byte = {};
      byte.settled = written;
    }
  }
}

void forget_shared(int slot) {
  auto& shared = checks().shared;
  if (shared.size() <= static_cast<size_t>(slot)) shared.resize(slot + 1);
  shared[slot].clear();
}

void read(void* to, const void* from, size_t bytes) {
  check(from, bytes, Kind::kRead, bytes);
  std::memcpy(to, from, bytes);
}

void write(void* to, const void* from, size_t bytes) {
  check(to, bytes, Kind::kWrite, bytes);
  std::memcpy(to, from, bytes);
}

void begin_atomic(const void* address, size_t bytes) {
  check(address, bytes, Kind::kAtomic, bytes);
  running.active = false;
}

void end_atomic() { running.active = true; }

}  // namespace adsc::simt

// ---- What -fsanitize=thread makes of a kernel's loads and stores ----

using adsc::simt::check;
using adsc::simt::Kind;

extern "C" {
#define ADSC_SIMT_HOOKS(SIZE)                                                            \
  void __tsan_read##SIZE(void* p) { check(p, SIZE, Kind::kRead, SIZE); }                 \
  void __tsan_write##SIZE(void* p) { check(p, SIZE, Kind::kWrite, SIZE); }               \
  void __tsan_volatile_read##SIZE(void* p) { check(p, SIZE, Kind::kRead, SIZE); }        \
  void __tsan_volatile_write##SIZE(void* p) { check(p, SIZE, Kind::kWrite, SIZE); }      \
  void __tsan_unaligned_read##SIZE(void* p) { check(p, SIZE, Kind::kRead, 1); }          \
  void __tsan_unaligned_write##SIZE(void* p) { check(p, SIZE, Kind::kWrite, 1); }        \
  void __tsan_unaligned_volatile_read##SIZE(void* p) { check(p, SIZE, Kind::kRead, 1); } \
  void __tsan_unaligned_volatile_write##SIZE(void* p) { check(p, SIZE, Kind::kWrite, 1); }
ADSC_SIMT_HOOKS(1)
ADSC_SIMT_HOOKS(2)
ADSC_SIMT_HOOKS(4)
ADSC_SIMT_HOOKS(8)
ADSC_SIMT_HOOKS(16)
#undef ADSC_SIMT_HOOKS
void __tsan_read_range(void* p, size_t size) { check(p, size, Kind::kRead, 1); }
void __tsan_write_range(void* p, size_t size) { check(p, size, Kind::kWrite, 1); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
