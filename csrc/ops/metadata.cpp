// rebuild_metadata.
#include "ops/metadata.h"

#include "cpu/metadata.h"
#include "cuda/check.h"
#include "cuda/metadata.h"
#include "ops/on_device.h"
#include "ops/ops.h"

namespace adsc::ops {
namespace {

Boundary boundary_of(const std::vector<int64_t>& keep, const std::string& pattern,
                     int64_t span_columns, int64_t max_height) {
  const bool grid = pattern == "grid";
  check(grid || pattern == "start" || pattern == "center" || pattern == "linspace",
        "pattern: expected start, center, linspace or grid, got ", pattern);
  check(keep.size() == (grid ? 4 : 2), "keep: expected ", grid ? 4 : 2, " integers, got ",
        keep.size());
  for (size_t i = 0; i < keep.size(); i += 2) {
    check(0 <= keep[i] && keep[i] <= keep[i + 1] && 0 < keep[i + 1] && keep[i + 1] < (1LL << 31),
          "keep: expected a fraction in [0, 1], got ", keep[i], "/", keep[i + 1]);
  }
  Boundary boundary{};
  boundary.pattern = pattern == "center" ? kCenter : pattern == "linspace" ? kLinspace : kStart;
  boundary.grid = grid;
  boundary.keep = {keep[0], keep[1]};
  boundary.span_blocks = 1;
  if (grid) {
    check(span_columns == 5, "spans: expected [N, 5] for the pattern grid, got [N, ", span_columns,
          "]");
    check(max_height >= 0 && max_height < (1LL << 31),
          "max_height: expected at least 0 for the pattern grid, got ", max_height);
    boundary.keep_cols = {keep[2], keep[3]};
    boundary.span_blocks = kept_count(max_height, keep[0], keep[1]);
  }
  return boundary;
}

}  // namespace

MetadataCall metadata_of(const Tensor& cu_seqlens, const Tensor& spans,
                         const std::vector<int64_t>& keep, const std::string& pattern,
                         int64_t max_height) {
  const int32_t int32 = aoti_torch_dtype_int32();
  check(dtype_of(cu_seqlens) == int32 && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 &&
            cu_seqlens.is_contiguous(),
        "cu_seqlens: expected contiguous int32 [B + 1], got shape ", Shape{cu_seqlens});
  check_device(spans, "spans", cu_seqlens, "cu_seqlens");
  check(dtype_of(spans) == int32 && spans.dim() == 2 &&
            (spans.size(1) == 3 || spans.size(1) == 5) && spans.is_contiguous(),
        "spans: expected contiguous int32 [N, 3] or [N, 5], got shape ", Shape{spans});
  const Boundary boundary = boundary_of(keep, pattern, spans.size(1), max_height);
  const BatchLayout layout{
      static_cast<const int32_t*>(cu_seqlens.const_data_ptr()), cu_seqlens.size(0) - 1,
      static_cast<const int32_t*>(spans.const_data_ptr()), spans.size(0), spans.size(1)};
  if (host_can_read(cu_seqlens)) {
    const std::string fault = cpu::find_layout_fault(layout, boundary);
    check(fault.empty(), fault);
  }
  const int64_t num_segments = layout.num_sequences + layout.num_spans * (1 + boundary.span_blocks);
  const auto output = [&](const std::vector<int64_t>& sizes) { return Output{cu_seqlens, sizes}; };
  return {layout,
          boundary,
          {},
          {output({layout.num_sequences + 1}), output({layout.num_spans, boundary.grid ? 5 : 3}),
           output({num_segments, kSegmentColumns}), output({layout.num_sequences}), output({}),
           output({})}};
}

void MetadataCall::set_outputs(const Tensor* tensors) {
  const auto data = [&](size_t i) { return static_cast<int32_t*>(tensors[i].mutable_data_ptr()); };
  stage = {data(0), data(1), reinterpret_cast<Segment*>(data(2)), data(3), data(4), data(5)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rebuild_metadata_cpu(
    Tensor cu_seqlens, Tensor spans, std::vector<int64_t> keep, std::string pattern,
    int64_t max_height) {
  MetadataCall call = metadata_of(cu_seqlens, spans, keep, pattern, max_height);
  const std::vector<Tensor> t = allocate(call.outputs);
  call.set_outputs(t.data());
  cpu::rebuild_metadata(call.layout, call.boundary, call.stage);
  return {t[0], t[1], t[2], t[3], t[4], t[5]};
}

#if defined(ADSC_WITH_CUDA)

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rebuild_metadata_cuda(
    Tensor cu_seqlens, Tensor spans, std::vector<int64_t> keep, std::string pattern,
    int64_t max_height) {
  MetadataCall call = metadata_of(cu_seqlens, spans, keep, pattern, max_height);
  const std::vector<Tensor> t = allocate(call.outputs);
  call.set_outputs(t.data());
  const OnDevice device(cu_seqlens);
  if (device_checks()) {
    constexpr int64_t kAnyRows = int64_t{1} << 31;  // how many there are is not known here
    cuda::check_layout(call.layout, call.boundary, kAnyRows, device.stream());
  }
  cuda::rebuild_metadata(call.layout, call.boundary, call.stage, device.stream());
  return {t[0], t[1], t[2], t[3], t[4], t[5]};
}

#endif

}  // namespace adsc::ops
