// downsample, downsample_many, and upsample_grad, their backward.
#include "cpu/downsample.h"

#include "cpu/upsample_grad.h"
#include "cuda/check.h"
#include "cuda/downsample.h"
#include "cuda/upsample_grad.h"
#include "ops/downsample.h"
#include "ops/on_device.h"
#include "ops/ops.h"
#include "ops/parallel.h"

namespace adsc::ops {

RowCopy row_copy(const Tensor& x, const RowLayout& layout) {
  const auto width = static_cast<int64_t>(x.element_size());
  return {bytes(x), layout.row_stride * width, nullptr, layout.row_size * width};
}

namespace {

struct Moves {
  RowMap map;
  std::vector<RowCopy> copies;
  std::vector<Tensor> outs;
};

Moves moves_of(const std::vector<Tensor>& xs, const char* name, const OptionalTensor& segments,
               const OptionalTensor& keep_indices, int64_t num_tokens) {
  check(!xs.empty(), name, ": expected at least one tensor, got none");
  std::vector<RowLayout> layouts;
  for (const Tensor& x : xs) {
    layouts.push_back(row_layout(x, name));
    check_device(x, name, xs[0], "the first");
    check(layouts.back().num_rows == layouts[0].num_rows, name,
          ": expected the same number of rows in all, got ", layouts[0].num_rows, " and ",
          layouts.back().num_rows);
  }
  Moves moves;
  moves.map = row_map(segments, keep_indices, num_tokens, layouts[0].num_rows, xs[0], name);
  for (size_t i = 0; i < xs.size(); ++i) {
    moves.outs.push_back(empty_rows(xs[i], num_tokens));
    moves.copies.push_back(row_copy(xs[i], layouts[i]));
    moves.copies.back().out = mutable_bytes(moves.outs[i]);
  }
  return moves;
}

void run_cpu(const Moves& moves) {
  int64_t bytes_per_row = 0;
  for (const RowCopy& copy : moves.copies) bytes_per_row += copy.row_bytes;
  parallel_rows(moves.map.num_tokens, bytes_per_row, [&](int64_t begin, int64_t end) {
    for (const RowCopy& copy : moves.copies) cpu::copy_rows(moves.map, copy, begin, end);
  });
}

#if defined(ADSC_WITH_CUDA)
void run_cuda(const Moves& moves) {
  const OnDevice device(moves.outs[0]);
  if (device_checks()) cuda::check_rows(moves.map, device.stream());
  cuda::copy_rows(moves.map, moves.copies.data(), static_cast<int>(moves.copies.size()),
                  device.stream());
}
#endif

struct Scatter {
  RowMap map;
  RowScatter rows;
  Tensor out;
};

Scatter scatter_of(const Tensor& grad, const OptionalTensor& segments,
                   const OptionalTensor& keep_indices, int64_t num_rows) {
  const RowLayout layout = row_layout(grad, "grad");
  check(grad.is_contiguous(), "grad: expected a contiguous tensor, got shape ", Shape{grad});
  check(num_rows >= 0, "num_rows: expected at least 0, got ", num_rows);
  const Element element = element_of(grad, "grad");
  const RowMap map = row_map(segments, keep_indices, layout.num_rows, num_rows, grad, "grad", true);
  Tensor out = empty_rows(grad, num_rows);
  return {map, {bytes(grad), mutable_bytes(out), layout.row_size * real_parts(grad), element}, out};
}

}  // namespace

Tensor downsample_cpu(Tensor x, OptionalTensor segments, OptionalTensor keep_indices,
                      int64_t num_tokens) {
  const Moves moves = moves_of({x}, "x", segments, keep_indices, num_tokens);
  run_cpu(moves);
  return moves.outs[0];
}

std::vector<Tensor> downsample_many_cpu(std::vector<Tensor> xs, OptionalTensor segments,
                                        OptionalTensor keep_indices, int64_t num_tokens) {
  const Moves moves = moves_of(xs, "xs", segments, keep_indices, num_tokens);
  run_cpu(moves);
  return moves.outs;
}

Tensor upsample_grad_cpu(Tensor grad, OptionalTensor segments, OptionalTensor keep_indices,
                         int64_t num_rows) {
  const Scatter scatter = scatter_of(grad, segments, keep_indices, num_rows);
  const cpu::Takers takers = cpu::find_takers(scatter.map);
  const int64_t row_bytes =
      scatter.rows.row_size * static_cast<int64_t>(grad.element_size()) / real_parts(grad);
  parallel_rows(num_rows, row_bytes, [&](int64_t begin, int64_t end) {
    cpu::add_rows(takers, scatter.rows, begin, end);
  });
  return scatter.out;
}

#if defined(ADSC_WITH_CUDA)

Tensor downsample_cuda(Tensor x, OptionalTensor segments, OptionalTensor keep_indices,
                       int64_t num_tokens) {
  const Moves moves = moves_of({x}, "x", segments, keep_indices, num_tokens);
  run_cuda(moves);
  return moves.outs[0];
}

std::vector<Tensor> downsample_many_cuda(std::vector<Tensor> xs, OptionalTensor segments,
                                         OptionalTensor keep_indices, int64_t num_tokens) {
  const Moves moves = moves_of(xs, "xs", segments, keep_indices, num_tokens);
  run_cuda(moves);
  return moves.outs;
}

Tensor upsample_grad_cuda(Tensor grad, OptionalTensor segments, OptionalTensor keep_indices,
                          int64_t num_rows) {
  const Scatter scatter = scatter_of(grad, segments, keep_indices, num_rows);
  const OnDevice device(grad);
  if (device_checks()) cuda::check_rows(scatter.map, device.stream(), true);
  cuda::add_rows(scatter.map, scatter.rows, device.stream());
  return scatter.out;
}

#endif

}  // namespace adsc::ops
