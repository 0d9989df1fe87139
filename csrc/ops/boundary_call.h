// All that a boundary does, its arguments checked; for boundary_step and compress_step.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cuda/boundary_step.h"
#include "ops/metadata_call.h"
#include "ops/outputs.h"

namespace adsc::ops {

struct BoundaryArguments {
  const Tensor& hidden;
  const OptionalTensor& residual;
  const OptionalTensor& weight;
  double eps;
  const std::vector<Tensor>& others;
  const OptionalTensor& segments;
  const OptionalTensor& keep_indices;
  const OptionalTensor& cu_seqlens;
  const OptionalTensor& spans;
  const std::vector<int64_t>& keep;
  const std::string& pattern;
  int64_t max_height;
  int64_t num_tokens;
};

struct BoundaryCall {
  RowMap map;  // with metadata only the numbers of rows
  std::optional<MetadataCall> metadata;
  std::optional<RowNorm> norm;
  std::vector<RowCopy> copies;
  std::vector<Output> outputs;  // hidden, residual if given, others, metadata

  // Tensors that are `outputs`.
  void set_outputs(const std::vector<Tensor>& tensors);

  // For the launchers; it refers to this.
  cuda::BoundaryMoves moves() const;
};

BoundaryCall boundary_call(const BoundaryArguments& arguments);

// Outputs are set. Nothing is written outside of them, also where it raises.
void run_on_cpu(const BoundaryCall& call);

#if defined(ADSC_WITH_CUDA)
// ADSC_CHECK=1
void check_on_cuda(const BoundaryCall& call, cuda::Stream stream);
#endif

}  // namespace adsc::ops
