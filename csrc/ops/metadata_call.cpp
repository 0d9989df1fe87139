#include "ops/metadata_call.h"

#include "cpu/rebuild_metadata.h"

namespace adsc::ops {
namespace {

Boundary boundary_of(const MetadataArguments& a) {
  const std::vector<int64_t>& keep = a.keep;
  const bool grid = a.pattern == "grid";
  check(grid || a.pattern == "start" || a.pattern == "center" || a.pattern == "linspace",
        "pattern: expected start, center, linspace or grid, got ", a.pattern);
  check(keep.size() == (grid ? 4 : 2), "keep: expected ", grid ? 4 : 2, " integers, got ",
        keep.size());
  for (size_t i = 0; i < keep.size(); i += 2) {
    check(0 <= keep[i] && keep[i] <= keep[i + 1] && 0 < keep[i + 1] && keep[i + 1] < (1LL << 31),
          "keep: expected a fraction in [0, 1], got ", keep[i], "/", keep[i + 1]);
  }
  if (!grid) {
    const int32_t pattern = a.pattern == "center"     ? kCenter
                            : a.pattern == "linspace" ? kLinspace
                                                      : kStart;
    return {.pattern = pattern, .keep_columns = {keep[0], keep[1]}};
  }
  check(a.spans.size(1) == 5, "spans: expected [N, 5] for the pattern grid, got [N, ",
        a.spans.size(1), "]");
  check(a.max_height >= 0 && a.max_height < (1LL << 31),
        "max_height: expected at least 0 for the pattern grid, got ", a.max_height);
  return {.grid = true,
          .keep_rows = {keep[0], keep[1]},
          .keep_columns = {keep[2], keep[3]},
          .span_segments = kept_count(a.max_height, keep[0], keep[1])};
}

}  // namespace

MetadataCall metadata_call(const MetadataArguments& a) {
  const Tensor& cu_seqlens = a.cu_seqlens;
  const Tensor& spans = a.spans;
  const int32_t int32 = aoti_torch_dtype_int32();
  check(dtype_of(cu_seqlens) == int32 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
            cu_seqlens.is_contiguous(),
        "cu_seqlens: expected contiguous int32 [B + 1], got shape ", Shape{cu_seqlens});
  check_device(spans, "spans", cu_seqlens, "cu_seqlens");
  check(dtype_of(spans) == int32 && spans.dim() == 2 &&
            (spans.size(1) == 3 || spans.size(1) == 5) && spans.is_contiguous(),
        "spans: expected contiguous int32 [N, 3] or [N, 5], got shape ", Shape{spans});
  const Boundary boundary = boundary_of(a);
  const BatchLayout layout{.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr()),
                           .num_sequences = cu_seqlens.size(0) - 1,
                           .spans = static_cast<const int32_t*>(spans.const_data_ptr()),
                           .num_spans = spans.size(0),
                           .span_columns = spans.size(1)};
  if (host_can_read(cu_seqlens)) {
    const std::string fault = cpu::find_layout_fault(layout, boundary);
    check(fault.empty(), fault);
  }
  MetadataCall call{.step = {.layout = layout, .boundary = boundary, .stage = {}}, .outputs = {}};
  for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{layout.num_sequences + 1},
                                            {layout.num_spans, span_columns(boundary)},
                                            {num_segments(call.step), kSegmentColumns},
                                            {layout.num_sequences},
                                            {},
                                            {}}) {
    call.outputs.push_back({.like = cu_seqlens, .sizes = sizes});
  }
  return call;
}

void MetadataCall::set_outputs(const Tensor* tensors) {
  const auto data = [&](size_t i) { return static_cast<int32_t*>(tensors[i].mutable_data_ptr()); };
  step.stage = {.cu_seqlens = data(0),
                .spans = data(1),
                .segments = reinterpret_cast<Segment*>(data(2)),
                .seq_lens = data(3),
                .num_tokens = data(4),
                .max_seqlen = data(5)};
}

}  // namespace adsc::ops
