// The arguments of a boundary whose layout is on the device, checked; for the ops that take it.
#pragma once

#include <string>
#include <vector>

#include "layout.h"
#include "ops/check.h"

namespace adsc::ops {

struct MetadataCall {
  BatchLayout layout;
  Boundary boundary;
  StageMetadata stage;          // set_outputs
  std::vector<Output> outputs;  // cu_seqlens, spans, segments, seq_lens, num_tokens, max_seqlen

  void set_outputs(const Tensor* tensors);
};

// keep: numerator and denominator; for the pattern "grid" those of the rows, then those of the
// columns. What the tensors hold is checked where the host can read it.
MetadataCall metadata_of(const Tensor& cu_seqlens, const Tensor& spans,
                         const std::vector<int64_t>& keep, const std::string& pattern,
                         int64_t max_height);

}  // namespace adsc::ops
