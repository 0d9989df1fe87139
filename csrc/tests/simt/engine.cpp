#include "engine.h"

#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <stdexcept>

#include "access.h"

namespace adsc::simt {

Running running;

Options& options() {
  static Options value;
  return value;
}

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr int kMaxFibers = 8192;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxDynamicBytes = 227 << 10;
constexpr size_t kAlignment = 1024;  // of dynamic shared memory, as bulk copies want it
constexpr unsigned char kPoison = 0xcd;
constexpr uint64_t kMaxSteps = 2'000'000'000;

class Random {
 public:
  void seed(uint64_t value) { state_ = value; }
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }
  bool one_in(uint32_t n) { return below(n) == 0; }

 private:
  uint64_t state_ = 0;
};

enum class State { kRunnable, kAtBarrier, kAtMeeting, kExited };

struct Block;

struct Fiber {
  Block* block = nullptr;
  State state = State::kRunnable;
  bool started = false;
  uint32_t thread = 0;
  uint32_t priority = 0;
  uint32_t fences = 0;
  uint32_t place = 0;  // in the block's list of runnable threads
  int stack = 0;
  jmp_buf context;
  // What it waits for, and what it brought.
  Where where;
  uint32_t mask = 0;
  bool fence = false;
  bool predicate = false;
  uint64_t value = 0;
  uint64_t* values = nullptr;
  uint32_t present = 0;
};

struct Block {
  uint32_t index = 0;
  int slot = 0;
  uint32_t priority = 0;
  uint32_t weight = 1;
  uint32_t barriers = 0;
  int barrier_count = 0;  // the result of the last barrier
  int exited = 0;
  int waiting = 0;
  std::vector<Fiber> fibers;
  std::vector<uint32_t> runnable;
  std::vector<unsigned char> static_memory;  // while another block runs
  std::byte* dynamic_memory = nullptr;
};

// How a launch's schedule is drawn; which of these it is, is drawn first.
struct Policy {
  bool by_priority;        // the highest random priority goes on, until it is drawn anew
  uint32_t change_one_in;  // of the points at which another could go on
};

struct Engine {
  dim3 grid, size;
  uint32_t threads = 0;
  size_t dynamic_bytes = 0;
  void (*entry)(const void*) = nullptr;
  const void* arguments = nullptr;
  Random random;
  Policy policy{};
  std::vector<Block*> resident;
  Block* swapped_in = nullptr;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::string error;
  uint64_t steps = 0;
  uint64_t launches = 0;
};
Engine engine;

// ---- Memory: stacks and shared memory ----

// Stacks in one reservation, each with a page below it that faults.
std::byte* stacks() {
  static std::byte* const base = [] {
    void* memory = mmap(nullptr, kMaxFibers * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
    return static_cast<std::byte*>(memory);
  }();
  return base;
}

std::byte* stack(int number) {
  static std::vector<bool> guarded(kMaxFibers);
  std::byte* begin = stacks() + number * kStackBytes;
  if (!guarded[number]) {
    mprotect(begin, sysconf(_SC_PAGESIZE), PROT_NONE);
    guarded[number] = true;
  }
  return begin;
}

// Without one that was touched, a library may have no thread-local memory yet.
thread_local volatile char anchor;

// The thread-local memory of the library that this code is part of.
void find_static_memory() {
  anchor = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        const auto here = reinterpret_cast<uintptr_t>(&running);
        bool ours = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          ours |= header.p_type == PT_LOAD && begin <= here && here < begin + header.p_memsz;
        }
        if (!ours) return 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
          running.static_begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
          running.static_end = running.static_begin + info->dlpi_phdr[i].p_memsz;
        }
        return 1;
      },
      nullptr);
}

void* static_memory() { return reinterpret_cast<void*>(running.static_begin); }
size_t static_bytes() { return running.static_end - running.static_begin; }

// Copies what the launch uses of static shared memory; what it has not touched holds poison anyway.
void swap_in(Block* block) {
  if (engine.swapped_in == block) return;
  auto* memory = reinterpret_cast<unsigned char*>(running.static_begin);
  if (running.touched_begin < running.touched_end) {
    const size_t begin = running.touched_begin - running.static_begin;
    const size_t size = running.touched_end - running.touched_begin;
    if (engine.swapped_in != nullptr) {
      std::memcpy(engine.swapped_in->static_memory.data() + begin, memory + begin, size);
    }
    std::memcpy(memory + begin, block->static_memory.data() + begin, size);
  }
  engine.swapped_in = block;
}

// ---- Errors ----

std::string position(const Fiber& fiber) {
  const dim3 g = engine.grid;
  const dim3 b = engine.size;
  const uint32_t i = fiber.block->index;
  const uint32_t t = fiber.thread;
  char text[128];
  std::snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", i % g.x, i / g.x % g.y,
                i / g.x / g.y, t % b.x, t / b.x % b.y, t / b.x / b.y);
  return text;
}

std::string place(const Where& where) {
  const std::string_view path = where.file_name();
  const size_t slash = path.rfind('/');
  return std::string(path.substr(slash == path.npos ? 0 : slash + 1)) + ":" +
         std::to_string(where.line());
}

// ---- Schedule ----

void suspend() {
  Fiber* fiber = engine.current;
  if (_setjmp(fiber->context) == 0) _longjmp(engine.scheduler, 1);
}

void make_runnable(Fiber& fiber) {
  fiber.state = State::kRunnable;
  fiber.place = static_cast<uint32_t>(fiber.block->runnable.size());
  fiber.block->runnable.push_back(fiber.thread);
}

void wait(Fiber& fiber, State state) {
  fiber.state = state;
  auto& runnable = fiber.block->runnable;
  runnable[fiber.place] = runnable.back();
  fiber.block->fibers[runnable.back()].place = fiber.place;
  runnable.pop_back();
}

// Lets the block's threads past the barrier once the last of them is there.
void try_barrier(Block& block) {
  if (block.waiting == 0 || block.waiting + block.exited < static_cast<int>(engine.threads)) return;
  if (block.exited > 0) return;  // the scheduler reports it, when nothing else can go on
  block.barrier_count = 0;
  for (const Fiber& fiber : block.fibers) block.barrier_count += fiber.predicate;
  ++block.barriers;
  block.waiting = 0;
  for (Fiber& fiber : block.fibers) make_runnable(fiber);
}

// Lets the lanes of a mask go on once all that are left of them wait with the same one.
void try_meeting(Block& block, uint32_t warp, uint32_t mask) {
  const uint32_t first = warp * kWarp;
  uint64_t values[kWarp];
  uint32_t present = 0;
  for (uint32_t i = 0; i < kWarp; ++i) {
    values[i] = 0xcdcdcdcdcdcdcdcdu;
    if ((mask >> i & 1) == 0 || first + i >= engine.threads) continue;
    const Fiber& fiber = block.fibers[first + i];
    if (fiber.state == State::kExited) continue;
    if (fiber.state != State::kAtMeeting || fiber.mask != mask) return;
    values[i] = fiber.value;
    present |= 1u << i;
  }
  for (uint32_t i = 0; i < kWarp; ++i) {
    if ((present >> i & 1) == 0) continue;
    Fiber& fiber = block.fibers[first + i];
    std::copy(values, values + kWarp, fiber.values);
    fiber.present = present;
    fiber.fences += fiber.fence;
    make_runnable(fiber);
  }
}

void run_fiber() {
  running.active = true;
  engine.entry(engine.arguments);
  running.active = false;
  Fiber& fiber = *engine.current;
  Block& block = *fiber.block;
  wait(fiber, State::kExited);
  ++block.exited;
  try_barrier(block);
  // Lanes that wait for this one need not any more.
  const uint32_t warp = fiber.thread / kWarp;
  for (uint32_t i = warp * kWarp; i < std::min(engine.threads, (warp + 1) * kWarp); ++i) {
    if (block.fibers[i].state == State::kAtMeeting) try_meeting(block, warp, block.fibers[i].mask);
  }
  _longjmp(engine.scheduler, 1);
}

void resume(Fiber& fiber) {
  engine.current = &fiber;
  swap_in(fiber.block);
  running.slot = fiber.block->slot;
  running.self = {fiber.block->index, fiber.thread, fiber.block->barriers, fiber.fences};
  running.stack_begin = reinterpret_cast<uintptr_t>(stack(fiber.stack));
  running.stack_end = running.stack_begin + kStackBytes;
  running.dynamic_begin = reinterpret_cast<uintptr_t>(fiber.block->dynamic_memory);
  running.dynamic_end = running.dynamic_begin + engine.dynamic_bytes;
  if (_setjmp(engine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack(fiber.stack);
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

Block* next_block() {
  Block* chosen = nullptr;
  if (engine.policy.by_priority) {
    for (Block* block : engine.resident) {
      if (block->runnable.empty()) continue;
      if (chosen == nullptr || block->priority > chosen->priority) chosen = block;
    }
    return chosen;
  }
  uint32_t total = 0;
  for (const Block* block : engine.resident) total += block->runnable.empty() ? 0 : block->weight;
  if (total == 0) return nullptr;
  uint32_t ticket = engine.random.below(total);
  for (Block* block : engine.resident) {
    if (block->runnable.empty()) continue;
    if (ticket < block->weight) return block;
    ticket -= block->weight;
  }
  return nullptr;
}

Fiber& next_fiber(Block& block) {
  const auto& runnable = block.runnable;
  if (!engine.policy.by_priority) {
    return block.fibers[runnable[engine.random.below(static_cast<uint32_t>(runnable.size()))]];
  }
  return block
      .fibers[*std::max_element(runnable.begin(), runnable.end(), [&](uint32_t a, uint32_t b) {
        return block.fibers[a].priority < block.fibers[b].priority;
      })];
}

std::string deadlock() {
  std::string text = "simt: deadlock: no thread can go on.";
  int listed = 0;
  for (const Block* block : engine.resident) {
    int exited = 0;
    const Fiber* last = nullptr;
    for (const Fiber& fiber : block->fibers) {
      exited += fiber.state == State::kExited;
      if (fiber.state == State::kExited) continue;
      // One line for each run of threads that wait at the same place.
      if (last != nullptr && last->state == fiber.state &&
          last->where.line() == fiber.where.line() && last->thread + 1 == fiber.thread) {
        last = &fiber;
        continue;
      }
      last = &fiber;
      if (++listed > 8) continue;
      text += "\n  " + position(fiber) + " and after: ";
      text +=
          fiber.state == State::kAtBarrier ? "waits at __syncthreads, " : "waits for its warp, ";
      text += place(fiber.where);
      if (fiber.state == State::kAtMeeting) {
        char mask[32];
        std::snprintf(mask, sizeof mask, ", mask %08x", fiber.mask);
        text += mask;
      }
    }
    if (exited > 0) text += "\n  " + std::to_string(exited) + " threads of the block have exited";
    if (listed > 8) break;
  }
  return text;
}

void start(Block& block, uint32_t index, int slot) {
  block.index = index;
  block.slot = slot;
  block.priority = engine.random.below(1u << 30);
  block.weight = 1u << engine.random.below(8);
  block.barriers = 0;
  block.exited = 0;
  block.waiting = 0;
  block.runnable.clear();
  block.fibers.resize(engine.threads);
  for (uint32_t t = 0; t < engine.threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.block = &block;
    fiber.started = false;
    fiber.thread = t;
    fiber.priority = engine.random.below(1u << 30);
    fiber.fences = 0;
    fiber.predicate = false;
    fiber.stack = slot * static_cast<int>(engine.threads) + static_cast<int>(t);
    make_runnable(fiber);
  }
  block.static_memory.assign(static_bytes(), kPoison);
  std::memset(block.dynamic_memory, kPoison, engine.dynamic_bytes);
  if (engine.swapped_in == &block) engine.swapped_in = nullptr;  // what it left is of no use
  forget_shared(slot);
}

void run_blocks(uint32_t count, std::vector<Block>& slots) {
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; ++i) order[i] = i;
  for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[engine.random.below(i)]);
  uint32_t started = 0;
  engine.resident.clear();
  for (size_t slot = 0; slot < slots.size() && started < count; ++slot) {
    start(slots[slot], order[started++], static_cast<int>(slot));
    engine.resident.push_back(&slots[slot]);
  }
  while (!engine.resident.empty()) {
    Block* block = next_block();
    if (block == nullptr) {
      engine.error = deadlock();
      return;
    }
    resume(next_fiber(*block));
    if (!engine.error.empty()) return;
    if (engine.current->block->exited == static_cast<int>(engine.threads)) {
      Block* done = engine.current->block;
      if (started < count) {
        start(*done, order[started++], done->slot);
      } else {
        std::erase(engine.resident, done);
      }
    }
  }
}

// A division by zero or a wild address in a kernel ends the launch, not the process.
class Signals {
 public:
  Signals() {
    static std::byte memory[64 << 10];
    const stack_t own{memory, 0, sizeof memory};
    sigaltstack(&own, &stack_before_);
    struct sigaction action = {};
    action.sa_handler = [](int number) {
      fail(number == SIGFPE ? "division by zero" : "a wild address, or no stack left");
    };
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; ++i) sigaction(kNumbers[i], &action, &before_[i]);
  }
  ~Signals() {
    for (int i = 0; i < 3; ++i) sigaction(kNumbers[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static constexpr int kNumbers[] = {SIGFPE, SIGSEGV, SIGBUS};
  stack_t stack_before_;
  struct sigaction before_[3];
};

// Keeps hooks out of the engine's own code, and tells them what has changed since.
class Inside {
 public:
  Inside() { running.active = false; }
  ~Inside() {
    const Fiber& fiber = *engine.current;
    running.self.barriers = fiber.block->barriers;
    running.self.fences = fiber.fences;
    running.active = true;
  }
};

}  // namespace

void give_way() {
  if (++engine.steps > kMaxSteps)
    fail("no end after %llu steps", static_cast<unsigned long long>(kMaxSteps));
  if (!engine.random.one_in(engine.policy.change_one_in)) return;
  if (engine.policy.by_priority) {
    Fiber& fiber = *engine.current;
    fiber.priority = engine.random.below(1u << 30);
    if (engine.random.one_in(4)) fiber.block->priority = engine.random.below(1u << 30);
  }
  suspend();
}

uint3 thread_index() {
  const uint32_t t = running.self.thread;
  return {t % engine.size.x, t / engine.size.x % engine.size.y, t / engine.size.x / engine.size.y};
}

uint3 block_index() {
  const uint32_t b = running.self.block;
  return {b % engine.grid.x, b / engine.grid.x % engine.grid.y, b / engine.grid.x / engine.grid.y};
}

dim3 block_size() { return engine.size; }
dim3 grid_size() { return engine.grid; }
int lane() { return static_cast<int>(running.self.thread % kWarp); }
std::byte* dynamic_shared() { return reinterpret_cast<std::byte*>(running.dynamic_begin); }

int barrier(bool predicate, Where where) {
  const Inside inside;
  Fiber& fiber = *engine.current;
  Block& block = *fiber.block;
  fiber.where = where;
  fiber.predicate = predicate;
  wait(fiber, State::kAtBarrier);
  ++block.waiting;
  try_barrier(block);
  suspend();
  return block.barrier_count;
}

uint32_t meet(uint32_t mask, uint64_t value, uint64_t values[32], bool fence, Where where) {
  const Inside inside;
  Fiber& fiber = *engine.current;
  if ((mask >> fiber.thread % kWarp & 1) == 0) {
    fail("%s: the mask %08x is without the calling lane", place(where).c_str(), mask);
  }
  fiber.where = where;
  fiber.mask = mask;
  fiber.value = value;
  fiber.values = values;
  fiber.fence = fence;
  wait(fiber, State::kAtMeeting);
  try_meeting(*fiber.block, fiber.thread / kWarp, mask);
  suspend();
  return fiber.present;
}

void fail(const char* format, ...) {
  running.active = false;
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  engine.error = "simt: " + position(*engine.current) + ": " + text;
  _longjmp(engine.scheduler, 1);
}

void trap(const char* format, long long a, long long b, long long c, long long d) {
  running.active = false;
  char text[512];
  std::snprintf(text, sizeof text, format, a, b, c, d);
  fail("trap: %s", text);
}

void run_grid(dim3 grid, dim3 size, size_t dynamic_bytes, void (*entry)(const void*),
              const void* arguments, size_t argument_bytes) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  find_static_memory();
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || blocks >= Touch::kMixed ||
      grid.y > 65535 || grid.z > 65535 || dynamic_bytes > kMaxDynamicBytes) {
    char text[160];
    std::snprintf(
        text, sizeof text,
        "simt: invalid configuration: grid %ux%ux%u, block %ux%ux%u, %zu bytes of dynamic "
        "shared memory",
        grid.x, grid.y, grid.z, size.x, size.y, size.z, dynamic_bytes);
    throw std::runtime_error(text);
  }
  engine.grid = grid;
  engine.size = size;
  engine.threads = static_cast<uint32_t>(threads);
  engine.dynamic_bytes = dynamic_bytes;
  engine.entry = entry;
  engine.arguments = arguments;
  engine.error.clear();
  engine.steps = 0;
  engine.swapped_in = nullptr;
  engine.random.seed(options().seed * 0x9e3779b97f4a7c15u + ++engine.launches);
  constexpr uint32_t kChanges[] = {1, 2, 8, 64};
  engine.policy = {engine.random.one_in(3), kChanges[engine.random.below(4)]};

  const uint64_t room = kMaxFibers / threads;
  const uint64_t wanted = options().resident > 0 ? options().resident : room;
  std::vector<Block> slots(std::min({room, wanted, blocks}));
  const size_t spacing = (dynamic_bytes + kAlignment - 1) / kAlignment * kAlignment;
  std::vector<std::byte> dynamic((slots.size() + 1) * spacing);
  const auto begin = reinterpret_cast<uintptr_t>(dynamic.data());
  const uintptr_t base = (begin + kAlignment - 1) / kAlignment * kAlignment;
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i].dynamic_memory = reinterpret_cast<std::byte*>(base + i * spacing);
  }
  running.all_dynamic_begin = base;
  running.all_dynamic_end = base + slots.size() * spacing;
  running.all_stacks_begin = reinterpret_cast<uintptr_t>(stacks());
  running.all_stacks_end = running.all_stacks_begin + kMaxFibers * kStackBytes;
  running.arguments_begin = reinterpret_cast<uintptr_t>(arguments);
  running.arguments_end = running.arguments_begin + argument_bytes;
  settle_global();

  std::vector<unsigned char> before(static_bytes());
  std::memcpy(before.data(), static_memory(), before.size());
  std::memset(static_memory(), kPoison, static_bytes());
  running.touched_begin = running.static_end;
  running.touched_end = running.static_begin;
  {
    const Signals signals;
    run_blocks(static_cast<uint32_t>(blocks), slots);
  }
  std::memcpy(static_memory(), before.data(), before.size());
  if (!engine.error.empty()) throw std::runtime_error(engine.error);
}

}  // namespace adsc::simt
