// rebuild_metadata.
#include "cpu/rebuild_metadata.h"

#include <tuple>
#include <vector>

#include "cuda/check.h"
#include "cuda/rebuild_metadata.h"
#include "ops/metadata_call.h"
#include "ops/on_device.h"
#include "ops/registration.h"
#include "ops/string_argument.h"

namespace adsc::ops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rebuild_metadata(
    const Tensor& cu_seqlens, const Tensor& spans, const std::vector<int64_t>& keep,
    const StringArgument& pattern, int64_t max_height) {
  MetadataCall call = metadata_call({.cu_seqlens = cu_seqlens,
                                     .spans = spans,
                                     .keep = keep,
                                     .pattern = pattern,
                                     .max_height = max_height});
  const std::vector<Tensor> t = allocate(call.outputs);
  call.set_outputs(t.data());
  run_on_device_of(
      cu_seqlens, [&] { cpu::rebuild_metadata(call.step); },
      [&](auto stream) {
        constexpr int64_t kAnyRows = int64_t{1} << 31;  // how many there are is not known here
        if (device_checks()) cuda::check_layout(call.step, kAnyRows, stream);
        cuda::rebuild_metadata(call.step, stream);
      });
  return {t[0], t[1], t[2], t[3], t[4], t[5]};
}

ADSC_OP(rebuild_metadata,
        "(Tensor cu_seqlens, Tensor spans, int[] keep, str pattern, SymInt max_height) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")

}  // namespace
}  // namespace adsc::ops
