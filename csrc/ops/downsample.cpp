// downsample and downsample_many.
#include "cpu/downsample.h"

#include <vector>

#include "cuda/check.h"
#include "cuda/downsample.h"
#include "ops/on_device.h"
#include "ops/outputs.h"
#include "ops/parallel.h"
#include "ops/registration.h"
#include "ops/rows.h"

namespace adsc::ops {
namespace {

// name: what the caller calls xs.
std::vector<Tensor> move_rows(const std::vector<Tensor>& xs, const char* name,
                              const OptionalTensor& segments, const OptionalTensor& keep_indices,
                              int64_t num_tokens) {
  check(!xs.empty(), name, ": expected at least one tensor, got none");
  const int64_t num_rows = row_shape(xs[0], name).num_rows;
  std::vector<RowCopy> copies;
  for (const Tensor& x : xs) {
    const RowShape shape = row_shape(x, name);
    check_device(x, name, xs[0], "the first");
    check(shape.num_rows == num_rows, name, ": expected the same number of rows in all, got ",
          num_rows, " and ", shape.num_rows);
    copies.push_back(row_copy(x, shape));
  }
  const RowMap map = row_map(segments, keep_indices, num_tokens, num_rows, xs[0], name);
  std::vector<Tensor> outs;
  for (size_t i = 0; i < xs.size(); ++i) {
    outs.push_back(empty_rows(xs[i], num_tokens));
    copies[i].out = mutable_bytes(outs[i]);
  }
  run_on_device_of(
      xs[0],
      [&] {
        parallel_rows(num_tokens, bytes_per_row(copies), [&](int64_t begin, int64_t end) {
          for (const RowCopy& copy : copies) cpu::copy_rows(map, copy, begin, end);
        });
      },
      [&](auto stream) {
        if (device_checks()) cuda::check_rows(map, stream);
        cuda::copy_rows(map, copies, stream);
      });
  return outs;
}

Tensor downsample(const Tensor& x, const OptionalTensor& segments,
                  const OptionalTensor& keep_indices, int64_t num_tokens) {
  return move_rows({x}, "x", segments, keep_indices, num_tokens)[0];
}

std::vector<Tensor> downsample_many(const std::vector<Tensor>& xs, const OptionalTensor& segments,
                                    const OptionalTensor& keep_indices, int64_t num_tokens) {
  return move_rows(xs, "xs", segments, keep_indices, num_tokens);
}

ADSC_OP(downsample,
        "(Tensor x, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) -> Tensor")
ADSC_OP(downsample_many,
        "(Tensor[] xs, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) -> Tensor[]")

}  // namespace
}  // namespace adsc::ops
