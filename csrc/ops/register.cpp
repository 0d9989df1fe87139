// torch.ops.adsc_kernels: the schemas, and which function serves them on which device. Built
// against PyTorch's stable ABI, so one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include "ops/ops.h"

#if defined(ADSC_SIMT)  // the emulator's copy: what serves CUDA, for tensors on the CPU
#define adsc_kernels adsc_simt
#define CUDA CPU
#endif

STABLE_TORCH_LIBRARY(adsc_kernels, m) {
  m.def(
      "downsample(Tensor x, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) -> Tensor");
  m.def(
      "downsample_many(Tensor[] xs, Tensor? segments, Tensor? keep_indices, SymInt num_tokens) "
      "-> Tensor[]");
  m.def(
      "upsample_grad(Tensor grad, Tensor? segments, Tensor? keep_indices, SymInt num_rows) "
      "-> Tensor");
  m.def(
      "downsample_add_rms_norm(Tensor x, Tensor residual, Tensor weight, Tensor? segments, "
      "Tensor? keep_indices, SymInt num_tokens, float eps) -> (Tensor, Tensor)");
  m.def(
      "rebuild_metadata(Tensor cu_seqlens, Tensor spans, int[] keep, str pattern, "
      "SymInt max_height) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "compact_kv_(Tensor(a!)[] caches, int num_layers, Tensor? segments, Tensor? keep_indices, "
      "Tensor cu_kept, Tensor? cu_rows, Tensor? prefix_lens, Tensor? seq_lens, "
      "Tensor? seq_starts, str layout) -> (Tensor, Tensor)");
  m.def(
      "compact_paged_kv_(Tensor(a!)[] caches, int num_layers, Tensor block_table, "
      "SymInt block_size, Tensor? segments, Tensor? keep_indices, Tensor cu_kept, "
      "Tensor? cu_rows, Tensor? prefix_lens, Tensor? seq_lens, bool edit_table, "
      "Tensor? pinned, str layout) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "boundary_step(Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] others, "
      "Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, Tensor? spans, int[] keep, "
      "str pattern, SymInt max_height, SymInt num_tokens) -> Tensor[]");
  m.def(
      "compress_step(Tensor hidden, Tensor? residual, Tensor? weight, float eps, "
      "Tensor[] others, Tensor? segments, Tensor? keep_indices, Tensor? cu_seqlens, "
      "Tensor? spans, int[] keep, str pattern, SymInt max_height, SymInt num_tokens, "
      "Tensor(a!)[] caches, int num_layers, Tensor? block_table, SymInt block_size, "
      "Tensor? cache_segments, Tensor? cache_keep_indices, Tensor cu_kept, Tensor? cu_rows, "
      "Tensor? prefix_lens, Tensor? seq_lens, Tensor? seq_starts, bool edit_table, "
      "Tensor? pinned, str layout, Tensor(b!)[] outs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#if !defined(ADSC_SIMT)
STABLE_TORCH_LIBRARY_IMPL(adsc_kernels, CPU, m) {
  m.impl("downsample", TORCH_BOX(&adsc::ops::downsample_cpu));
  m.impl("downsample_many", TORCH_BOX(&adsc::ops::downsample_many_cpu));
  m.impl("upsample_grad", TORCH_BOX(&adsc::ops::upsample_grad_cpu));
  m.impl("downsample_add_rms_norm", TORCH_BOX(&adsc::ops::downsample_add_rms_norm_cpu));
  m.impl("rebuild_metadata", TORCH_BOX(&adsc::ops::rebuild_metadata_cpu));
  m.impl("compact_kv_", TORCH_BOX(&adsc::ops::compact_kv_cpu));
  m.impl("compact_paged_kv_", TORCH_BOX(&adsc::ops::compact_paged_kv_cpu));
  m.impl("boundary_step", TORCH_BOX(&adsc::ops::boundary_step_cpu));
  m.impl("compress_step", TORCH_BOX(&adsc::ops::compress_step_cpu));
}
#endif

#if defined(ADSC_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(adsc_kernels, CUDA, m) {
  m.impl("downsample", TORCH_BOX(&adsc::ops::downsample_cuda));
  m.impl("downsample_many", TORCH_BOX(&adsc::ops::downsample_many_cuda));
  m.impl("upsample_grad", TORCH_BOX(&adsc::ops::upsample_grad_cuda));
  m.impl("downsample_add_rms_norm", TORCH_BOX(&adsc::ops::downsample_add_rms_norm_cuda));
  m.impl("compact_kv_", TORCH_BOX(&adsc::ops::compact_kv_cuda));
  m.impl("compact_paged_kv_", TORCH_BOX(&adsc::ops::compact_paged_kv_cuda));
  m.impl("rebuild_metadata", TORCH_BOX(&adsc::ops::rebuild_metadata_cuda));
  m.impl("boundary_step", TORCH_BOX(&adsc::ops::boundary_step_cuda));
  m.impl("compress_step", TORCH_BOX(&adsc::ops::compress_step_cuda));
}
#endif
