// Runs the blocks of a kernel on one CPU thread. Each CUDA thread is a fiber with a stack of its
// own; at every access to memory, barrier or warp intrinsic another may go on, of this block or of
// another one that is resident, as a seeded random schedule says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace adsc::simt {

struct Options {
  uint64_t seed = 0;
  int resident = 1;  // blocks that run interleaved; 0: as many as there is room for
  int64_t enough_threads =
      1024;           // as of a smaller GPU: launchers cut the same work into larger tiles
  bool races = true;  // report two accesses, one a write, that nothing orders
};
Options& options();

// Which thread touched a byte last, and when. `block` kMixed: threads of several blocks; `thread`
// kMixed: of several warps of one block; kWarp + w: lanes of warp w.
struct Touch {
  static constexpr uint32_t kNobody = 0xffffffffu;
  static constexpr uint32_t kMixed = 0xfffffffeu;
  static constexpr uint32_t kWarp = 0x10000u;
  uint32_t block = kNobody;
  uint32_t thread = 0;
  uint32_t barriers = 0;  // of the block, passed by the thread until then
  uint32_t fences = 0;    // of the warp
};

// The launch at hand, as seen by the checks of memory accesses.
struct Running {
  bool active = false;                       // kernel code is running: hooks report to the engine
  Touch self;                                // the running thread, now
  uintptr_t stack_begin = 0, stack_end = 0;  // of the running thread
  uintptr_t all_stacks_begin = 0, all_stacks_end = 0;  // of all
  uintptr_t arguments_begin = 0, arguments_end = 0;    // of the kernel
  uintptr_t static_begin = 0, static_end = 0;          // static shared memory
  uintptr_t touched_begin = 0, touched_end = 0;        // what of it the launch has used so far
  uintptr_t dynamic_begin = 0, dynamic_end = 0;        // the running block's
  uintptr_t all_dynamic_begin = 0, all_dynamic_end = 0;
  int slot = 0;  // which of the resident blocks it is
};
extern Running running;

// Lets another thread go on, if the schedule says so.
void give_way();

// Calls entry(arguments) for every thread of the grid. Throws std::runtime_error where the kernel
// does what it may not, naming block and thread.
void run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, void (*entry)(const void*),
              const void* arguments, size_t argument_bytes);

}  // namespace adsc::simt
