#include "ops/norm.h"

#include "ops/rows.h"

namespace adsc::ops {

RowNorm row_norm(const NormArguments& a) {
  const Tensor& x = a.x;
  const Tensor& residual = a.residual;
  const Tensor& weight = a.weight;
  check(x.dim() == 2, a.x_name, ": expected shape [rows, hidden], got ", Shape{x});
  const RowShape x_shape = row_shape(x, a.x_name);
  const RowShape residual_shape = row_shape(residual, "residual");
  check(residual.dim() == 2 && residual.size(0) == x.size(0) && residual.size(1) == x.size(1),
        "residual: expected the shape of ", a.x_name, ", ", Shape{x}, ", got ", Shape{residual});
  check(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous(),
        "weight: expected a contiguous [", x.size(1), "], got shape ", Shape{weight});
  check(dtype_of(residual) == dtype_of(x), "residual: expected the dtype of ", a.x_name);
  check(dtype_of(weight) == dtype_of(x), "weight: expected the dtype of ", a.x_name);
  check(real_parts(x) == 1, a.x_name, ": expected float32, float64, bfloat16 or float16");
  check_device(residual, "residual", x, a.x_name);
  check_device(weight, "weight", x, a.x_name);
  check(a.eps >= 0, "eps: expected at least 0, got ", a.eps);
  const auto width = static_cast<int64_t>(x.element_size());
  return {.x = bytes(x),
          .x_stride = x_shape.row_stride * width,
          .residual = bytes(residual),
          .residual_stride = residual_shape.row_stride * width,
          .weight = bytes(weight),
          .width = x_shape.row_size,
          .eps = a.eps,
          .element = element_of(x, a.x_name)};
}

}  // namespace adsc::ops
