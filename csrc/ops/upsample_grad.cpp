// upsample_grad, the backward of downsample and downsample_many.
#include "cpu/upsample_grad.h"

#include "cuda/check.h"
#include "cuda/upsample_grad.h"
#include "ops/on_device.h"
#include "ops/outputs.h"
#include "ops/parallel.h"
#include "ops/registration.h"
#include "ops/rows.h"

namespace adsc::ops {
namespace {

Tensor upsample_grad(const Tensor& grad, const OptionalTensor& segments,
                     const OptionalTensor& keep_indices, int64_t num_rows) {
  const RowShape shape = row_shape(grad, "grad");
  check(grad.is_contiguous(), "grad: expected a contiguous tensor, got shape ", Shape{grad});
  check(num_rows >= 0, "num_rows: expected at least 0, got ", num_rows);
  const Element element = element_of(grad, "grad");
  const RowMap map = row_map(segments, keep_indices, shape.num_rows, num_rows, grad, "grad", true);
  const Tensor out = empty_rows(grad, num_rows);
  const RowScatter rows{.grad = bytes(grad),
                        .out = mutable_bytes(out),
                        .row_size = shape.row_size * real_parts(grad),
                        .element = element};
  run_on_device_of(
      grad,
      [&] {
        const cpu::Takers takers = cpu::find_takers(map);
        const int64_t row_bytes = shape.row_size * static_cast<int64_t>(grad.element_size());
        parallel_rows(num_rows, row_bytes,
                      [&](int64_t begin, int64_t end) { cpu::add_rows(takers, rows, begin, end); });
      },
      [&](auto stream) {
        if (device_checks()) cuda::check_rows(map, stream, true);
        cuda::add_rows(map, rows, stream);
      });
  return out;
}

ADSC_OP(upsample_grad,
        "(Tensor grad, Tensor? segments, Tensor? keep_indices, SymInt num_rows) -> Tensor")

}  // namespace
}  // namespace adsc::ops
