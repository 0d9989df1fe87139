// The arguments of a boundary whose layout lies in a tensor, checked; for rebuild_metadata,
// boundary_step and compress_step.
#pragma once

#include <string>
#include <vector>

#include "boundary.h"
#include "ops/outputs.h"

namespace adsc::ops {

struct MetadataArguments {
  const Tensor& cu_seqlens;
  const Tensor& spans;
  // Numerator and denominator; for the pattern "grid" those of the rows, then those of the columns.
  const std::vector<int64_t>& keep;
  const std::string& pattern;
  int64_t max_height;
};

struct MetadataCall {
  MetadataStep step;            // its stage: by set_outputs
  std::vector<Output> outputs;  // cu_seqlens, spans, segments, seq_lens, num_tokens, max_seqlen

  // The first of the tensors that are `outputs`.
  void set_outputs(const Tensor* tensors);
  int64_t num_segments() const { return outputs[2].sizes[0]; }
};

// What the tensors hold is checked where the host can read it.
MetadataCall metadata_call(const MetadataArguments& arguments);

}  // namespace adsc::ops
