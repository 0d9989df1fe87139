// boundary_step: norm, moves and metadata of one boundary.
#include "cuda/boundary_step.h"

#include <vector>

#include "ops/boundary_call.h"
#include "ops/on_device.h"
#include "ops/registration.h"
#include "ops/string_argument.h"

namespace adsc::ops {
namespace {

std::vector<Tensor> boundary_step(const Tensor& hidden, const OptionalTensor& residual,
                                  const OptionalTensor& weight, double eps,
                                  const std::vector<Tensor>& others, const OptionalTensor& segments,
                                  const OptionalTensor& keep_indices,
                                  const OptionalTensor& cu_seqlens, const OptionalTensor& spans,
                                  const std::vector<int64_t>& keep, const StringArgument& pattern,
                                  int64_t max_height, int64_t num_tokens) {
  BoundaryCall call = boundary_call({.hidden = hidden,
                                     .residual = residual,
                                     .weight = weight,
                                     .eps = eps,
                                     .others = others,
                                     .segments = segments,
                                     .keep_indices = keep_indices,
                                     .cu_seqlens = cu_seqlens,
                                     .spans = spans,
                                     .keep = keep,
                                     .pattern = pattern,
                                     .max_height = max_height,
                                     .num_tokens = num_tokens});
  const std::vector<Tensor> outs = allocate(call.outputs);
  call.set_outputs(outs);
  run_on_device_of(
      hidden, [&] { run_on_cpu(call); },
      [&](auto stream) {
        if (device_checks()) check_on_cuda(call, stream);
        cuda::boundary_step(call.moves(), stream);
      });
  return outs;
}

ADSC_OP(boundary_step,
        "(Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] others, "
        "Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, Tensor? spans, int[] keep, "
        "str pattern, SymInt max_height, SymInt num_tokens) -> Tensor[]")

}  // namespace
}  // namespace adsc::ops
