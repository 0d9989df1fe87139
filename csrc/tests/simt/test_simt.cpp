// The emulator itself: what it computes, and that it reports each kind of fault that is planted
// here.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "../check.h"
#include "access.h"
#include "launch.h"

namespace {

using adsc::simt::launch;
using adsc::simt::options;

__global__ void who(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

// The sum over each block by shuffles and shared memory.
template <class T>
__global__ void __launch_bounds__(256) block_sums(const T* in, T* out) {
  __shared__ T sums[8];
  T sum = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    T total = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += sums[warp];
    out[blockIdx.x] = total;
  }
}

__global__ void warp_intrinsics(int* out) {
  const int lane = threadIdx.x;
  int ok = __ballot_sync(0xffffffffu, lane % 3 == 0) == 0x49249249u;
  ok &= __any_sync(0xffffffffu, lane == 31) && !__all_sync(0xffffffffu, lane == 31);
  ok &= __shfl_sync(0xffffffffu, lane, 5, 8) == lane / 8 * 8 + 5;
  ok &= __shfl_up_sync(0xffffffffu, lane, 3) == (lane < 3 ? lane : lane - 3);
  ok &= __shfl_down_sync(0xffffffffu, lane, 3, 16) == (lane % 16 > 12 ? lane : lane + 3);
  ok &= __match_any_sync(0xffffffffu, lane % 2) == (lane % 2 != 0 ? 0xaaaaaaaau : 0x55555555u);
  ok &=
      __reduce_max_sync(0xffffffffu, 100 - lane) == 100 && __reduce_add_sync(0xffffffffu, 2) == 64;
  if (lane < 8) ok &= __shfl_xor_sync(0xffu, lane, 7) == 7 - lane;  // part of a warp
  ok &=
      __syncthreads_count(lane < 7) == 7 && __syncthreads_or(lane == 9) && !__syncthreads_and(lane);
  out[lane] = ok;
}

__global__ void histogram(const int* in, int* out) {
  atomicAdd(&out[in[blockIdx.x * blockDim.x + threadIdx.x]], 1);
  atomicMax(&out[4], static_cast<int>(blockIdx.x));
}

__global__ void reverse_dynamic(int* data) {
  auto* tile = reinterpret_cast<int*>(adsc::simt::dynamic_shared());
  tile[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// ---- Planted faults ----

template <bool kFirst, bool kSecond>
__global__ void rotate(int* data, int rounds) {
  __shared__ int tile[64];
  int value = data[threadIdx.x];
  for (int i = 0; i < rounds; ++i) {
    tile[threadIdx.x] = value;
    if (kFirst) __syncthreads();
    value = tile[(threadIdx.x + 1) % 64];
    if (kSecond) __syncthreads();
  }
  data[threadIdx.x] = value;
}

__global__ void warp_rotate(int* data, bool fence) {
  __shared__ int tile[32];
  tile[threadIdx.x] = data[threadIdx.x];
  if (fence) __syncwarp();
  const int value = tile[(threadIdx.x + 1) % 32];
  if (fence) __syncwarp();
  tile[threadIdx.x] = value;
  if (fence) __syncwarp();
  data[threadIdx.x] = tile[threadIdx.x];
}

// In place, each block a chunk of rows: reads rows that another block writes.
__global__ void shift_down(int* rows) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  const int value = rows[row + 1];
  rows[row] = value;
}

__global__ void some_at_the_barrier(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void part_of_a_mask(int* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
  __syncthreads();
}

__global__ void unset_shared(int* out) {
  __shared__ int tile[2];
  if (threadIdx.x == 0) tile[0] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[out[0]];
}

__global__ void copy_at(const int* in, int* out, int index) { out[index] = in[index]; }
__global__ void write_in(int* in) { in[0] = 1; }
__global__ void wide(const std::byte* in, uint4* out) {
  *out = *reinterpret_cast<const uint4*>(in);
}
__global__ void divide(int* out, int by) { *out /= by; }
__global__ void wild(int** out) { **out = 1; }
__global__ void accumulate(int* out) { ++*out; }

std::string error_of(auto&& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) {
  if (text.find(part) != text.npos) return true;
  std::printf("expected '%s' in '%s'\n", part, text.c_str());
  return false;
}

void test_values() {
  std::vector<int> ids(2 * 3 * 2 * 32);
  launch(who, dim3(2, 3, 2), dim3(4, 4, 2), 0, ids.data());
  for (int i = 0; i < static_cast<int>(ids.size()); ++i) CHECK(ids[i] == i / 32 * 1000 + i % 32);

  std::vector<double> in(20 * 256), sums(20);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<double>(i);
  launch(block_sums<double>, 20, 256, 0, in.data(), sums.data());
  for (int b = 0; b < 20; ++b) CHECK(sums[b] == 256.0 * (256 * b) + 256 * 255 / 2);

  std::vector<int> ok(32);
  launch(warp_intrinsics, 1, 32, 0, ok.data());
  for (const int one : ok) CHECK(one == 1);

  std::vector<int> numbers(8 * 64), counts(5);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int>(i % 4);
  launch(histogram, 8, 64, 0, numbers.data(), counts.data());
  CHECK((counts == std::vector<int>{128, 128, 128, 128, 7}));

  std::vector<int> row(96);
  for (int i = 0; i < 96; ++i) row[i] = i;
  launch(reverse_dynamic, 1, 96, 96 * sizeof(int), row.data());
  for (int i = 0; i < 96; ++i) CHECK(row[i] == 95 - i);
  CHECK(has(error_of([&] { launch(reverse_dynamic, 1, 96, 95 * sizeof(int), row.data()); }),
            "dynamic shared memory"));
  CHECK(has(error_of([&] { launch(write_in, 1, 1025, 0, row.data()); }), "invalid configuration"));
}

void test_shared_races() {
  std::vector<int> data(64);
  const auto run = [&](auto kernel, int rounds) {
    for (int i = 0; i < 64; ++i) data[i] = i;
    return error_of([&] { launch(kernel, 1, 64, 0, data.data(), rounds); });
  };
  CHECK((run(rotate<true, true>, 3) == ""));
  for (int i = 0; i < 64; ++i) CHECK(data[i] == (i + 3) % 64);
  CHECK(has(run(rotate<true, false>, 3), "race"));
  CHECK((run(rotate<true, false>, 1) == ""));
  CHECK(has(run(rotate<false, true>, 1), "shared memory"));

  CHECK(error_of([&] { launch(warp_rotate, 1, 32, 0, data.data(), true); }).empty());
  CHECK(has(error_of([&] { launch(warp_rotate, 1, 32, 0, data.data(), false); }), "shared memory"));

  // Without the check, the schedules alone must show it.
  options().races = false;
  int wrong = 0;
  for (int i = 0; i < 20; ++i) {
    wrong += run(rotate<true, false>, 3) != "";
    for (int t = 0; t < 64; ++t) wrong += data[t] != (t + 3) % 64;
  }
  CHECK(wrong > 0);
  options().races = true;
}

void test_races_between_blocks() {
  std::vector<int> rows(4 * 32 + 1);
  const auto run = [&] {
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int>(i);
    return error_of([&] { launch(shift_down, 4, 32, 0, rows.data()); });
  };
  CHECK(has(run(), "race"));
  options().races = false;
  for (const int resident : {1, 0}) {
    options().resident = resident;
    int wrong = 0;
    for (int i = 0; i < 20; ++i) {
      run();
      for (int r = 0; r < 4 * 32; ++r) wrong += rows[r] != r + 1;
    }
    CHECK(wrong > 0);
  }
  options().resident = 0;
  int lost = 0;
  for (int i = 0; i < 20; ++i) {
    int count = 0;
    launch(accumulate, 4, 32, 0, &count);
    lost += count != 4 * 32;
  }
  CHECK(lost > 0);
  options() = {};
  CHECK(has(error_of([&] { launch(accumulate, 1, 2, 0, rows.data()); }), "race"));
}

void test_barriers() {
  std::vector<int> out(64);
  CHECK(has(error_of([&] { launch(some_at_the_barrier, 3, 64, 0, out.data()); }),
            "24 threads of the block have exited"));
  const std::string text = error_of([&] { launch(part_of_a_mask, 1, 32, 0, out.data()); });
  CHECK(has(text, "deadlock"));
  CHECK(has(text, "block (0,0,0) thread (3,0,0) and after: waits at __syncthreads, test_simt.cpp"));
  CHECK(has(text, "mask ffffffff"));
}

void test_memory() {
  using adsc::simt::allow;
  std::vector<int> in(8), out(8);
  out[0] = 1;
  CHECK(has(error_of([&] { launch(unset_shared, 1, 64, 0, out.data()); }), "nothing has written"));
  CHECK(error_of([&] { launch(copy_at, 1, 1, 0, in.data(), out.data(), 7); }).empty());

  allow(in.data(), 4 * sizeof(int), false, true);
  allow(out.data(), 8 * sizeof(int), true, false);
  CHECK(error_of([&] { launch(copy_at, 1, 1, 0, in.data(), out.data(), 3); }).empty());
  CHECK(has(error_of([&] { launch(copy_at, 1, 1, 0, in.data(), out.data(), 4); }),
            "out of bounds: read"));
  CHECK(
      has(error_of([&] { launch(copy_at, 1, 1, 0, in.data(), out.data(), -1); }), "bytes before"));
  CHECK(has(error_of([&] { launch(write_in, 1, 1, 0, in.data()); }), "only to be read"));
  CHECK(has(error_of([&] { launch(accumulate, 1, 1, 0, out.data()); }), "nothing has written"));
  adsc::simt::allow_anything();

  alignas(16) std::byte bytes[32] = {};
  uint4 four;
  CHECK(error_of([&] { launch(wide, 1, 1, 0, bytes + 16, &four); }).empty());
  CHECK(has(error_of([&] { launch(wide, 1, 1, 0, bytes + 4, &four); }), "misaligned"));
  for (int i = 0; i < 2; ++i) {
    CHECK(has(error_of([&] { launch(divide, 1, 4, 0, out.data(), 0); }), "division by zero"));
    int* nowhere = reinterpret_cast<int*>(64);
    CHECK(has(error_of([&] { launch(wild, 2, 4, 0, &nowhere); }), "a wild address"));
  }
}

}  // namespace

int main() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    options() = {};
    options().seed = seed;
    options().resident = static_cast<int>(seed % 4);
    test_values();
    test_shared_races();
  }
  test_races_between_blocks();
  test_barriers();
  test_memory();
  return adsc::test::failures();
}
