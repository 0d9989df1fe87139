// downsample_add_rms_norm.
#include "cpu/norm.h"

#include "cuda/check.h"
#include "cuda/norm.h"
#include "ops/norm.h"
#include "ops/on_device.h"
#include "ops/ops.h"
#include "ops/parallel.h"

namespace adsc::ops {

RowNorm norm_of(const Tensor& x, const char* name, const Tensor& residual, const Tensor& weight,
                int64_t num_tokens, double eps) {
  check(x.dim() == 2, name, ": expected shape [rows, hidden], got ", Shape{x});
  const RowLayout x_layout = row_layout(x, name);
  const RowLayout residual_layout = row_layout(residual, "residual");
  check(residual.dim() == 2 && residual.size(0) == x.size(0) && residual.size(1) == x.size(1),
        "residual: expected the shape of ", name, ", ", Shape{x}, ", got ", Shape{residual});
  check(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous(),
        "weight: expected a contiguous [", x.size(1), "], got shape ", Shape{weight});
  check(dtype_of(residual) == dtype_of(x), "residual: expected the dtype of ", name);
  check(dtype_of(weight) == dtype_of(x), "weight: expected the dtype of ", name);
  check(real_parts(x) == 1, name, ": expected float32, float64, bfloat16 or float16");
  check_device(residual, "residual", x, name);
  check_device(weight, "weight", x, name);
  check(eps >= 0, "eps: expected at least 0, got ", eps);
  check(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  const auto width = static_cast<int64_t>(x.element_size());
  return {bytes(x),
          x_layout.row_stride * width,
          bytes(residual),
          residual_layout.row_stride * width,
          bytes(weight),
          nullptr,
          nullptr,
          x_layout.row_size,
          eps,
          element_of(x, name)};
}

namespace {

struct Norm {
  RowMap map;
  RowNorm rows;
  Tensor normed, residual_out;
};

Norm norm_call(const Tensor& x, const Tensor& residual, const Tensor& weight,
               const OptionalTensor& segments, const OptionalTensor& keep_indices,
               int64_t num_tokens, double eps) {
  const RowNorm rows = norm_of(x, "x", residual, weight, num_tokens, eps);
  const RowMap map = row_map(segments, keep_indices, num_tokens, x.size(0), x, "x");
  Norm norm{map, rows, empty_rows(x, num_tokens), empty_rows(x, num_tokens)};
  norm.rows.normed = mutable_bytes(norm.normed);
  norm.rows.residual_out = mutable_bytes(norm.residual_out);
  return norm;
}

}  // namespace

std::tuple<Tensor, Tensor> downsample_add_rms_norm_cpu(Tensor x, Tensor residual, Tensor weight,
                                                       OptionalTensor segments,
                                                       OptionalTensor keep_indices,
                                                       int64_t num_tokens, double eps) {
  const Norm norm = norm_call(x, residual, weight, segments, keep_indices, num_tokens, eps);
  parallel_rows(
      num_tokens, 4 * norm.rows.width * static_cast<int64_t>(x.element_size()),
      [&](int64_t begin, int64_t end) { cpu::add_rms_norm_rows(norm.map, norm.rows, begin, end); });
  return {norm.normed, norm.residual_out};
}

#if defined(ADSC_WITH_CUDA)

std::tuple<Tensor, Tensor> downsample_add_rms_norm_cuda(Tensor x, Tensor residual, Tensor weight,
                                                        OptionalTensor segments,
                                                        OptionalTensor keep_indices,
                                                        int64_t num_tokens, double eps) {
  const Norm norm = norm_call(x, residual, weight, segments, keep_indices, num_tokens, eps);
  const OnDevice device(x);
  if (device_checks()) cuda::check_rows(norm.map, device.stream());
  cuda::add_rms_norm_rows(norm.map, norm.rows, device.stream());
  return {norm.normed, norm.residual_out};
}

#endif

}  // namespace adsc::ops
