// downsample_add_rms_norm.
#include "cpu/downsample_add_rms_norm.h"

#include <string>
#include <tuple>

#include "cuda/check.h"
#include "cuda/downsample_add_rms_norm.h"
#include "ops/norm.h"
#include "ops/on_device.h"
#include "ops/outputs.h"
#include "ops/parallel.h"
#include "ops/registration.h"
#include "ops/rows.h"

namespace adsc::ops {
namespace {

std::tuple<Tensor, Tensor> downsample_add_rms_norm(const Tensor& x, const Tensor& residual,
                                                   const Tensor& weight,
                                                   const OptionalTensor& segments,
                                                   const OptionalTensor& keep_indices,
                                                   int64_t num_tokens, double eps) {
  RowNorm norm =
      row_norm({.x = x, .x_name = "x", .residual = residual, .weight = weight, .eps = eps});
  const RowMap map = row_map(segments, keep_indices, num_tokens, x.size(0), x, "x");
  const Tensor normed = empty_rows(x, num_tokens);
  const Tensor residual_out = empty_rows(x, num_tokens);
  norm.normed = mutable_bytes(normed);
  norm.residual_out = mutable_bytes(residual_out);
  run_on_device_of(
      x,
      [&] {
        const int64_t row_bytes = 4 * norm.width * static_cast<int64_t>(x.element_size());
        parallel_rows(num_tokens, row_bytes, [&](int64_t begin, int64_t end) {
          cpu::add_rms_norm_rows(map, norm, begin, end);
        });
      },
      [&](auto stream) {
        if (device_checks()) cuda::check_rows(map, stream);
        cuda::add_rms_norm_rows(map, norm, stream);
      });
  return {normed, residual_out};
}

ADSC_OP(downsample_add_rms_norm,
        "(Tensor x, Tensor residual, Tensor weight, Tensor? segments, Tensor? keep_indices, "
        "SymInt num_tokens, float eps) -> (Tensor, Tensor)")

}  // namespace
}  // namespace adsc::ops
