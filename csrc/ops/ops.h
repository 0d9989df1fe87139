// The functions that register.cpp registers, by op and device; each is found in <family>.cpp.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "ops/check.h"

namespace adsc::ops {

Tensor downsample_cpu(Tensor x, OptionalTensor segments, OptionalTensor keep_indices,
                      int64_t num_tokens);
std::vector<Tensor> downsample_many_cpu(std::vector<Tensor> xs, OptionalTensor segments,
                                        OptionalTensor keep_indices, int64_t num_tokens);
Tensor upsample_grad_cpu(Tensor grad, OptionalTensor segments, OptionalTensor keep_indices,
                         int64_t num_rows);
std::tuple<Tensor, Tensor> downsample_add_rms_norm_cpu(Tensor x, Tensor residual, Tensor weight,
                                                       OptionalTensor segments,
                                                       OptionalTensor keep_indices,
                                                       int64_t num_tokens, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rebuild_metadata_cpu(
    Tensor cu_seqlens, Tensor spans, std::vector<int64_t> keep, std::string pattern,
    int64_t max_height);
std::tuple<Tensor, Tensor> compact_kv_cpu(std::vector<Tensor> caches, int64_t num_layers,
                                          OptionalTensor segments, OptionalTensor keep_indices,
                                          Tensor cu_kept, OptionalTensor cu_rows,
                                          OptionalTensor prefix_lens, OptionalTensor seq_lens,
                                          OptionalTensor seq_starts, std::string layout);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact_paged_kv_cpu(
    std::vector<Tensor> caches, int64_t num_layers, Tensor block_table, int64_t block_size,
    OptionalTensor segments, OptionalTensor keep_indices, Tensor cu_kept, OptionalTensor cu_rows,
    OptionalTensor prefix_lens, OptionalTensor seq_lens, bool edit_table, OptionalTensor pinned,
    std::string layout);
std::tuple<Tensor, Tensor> compact_kv_cuda(std::vector<Tensor> caches, int64_t num_layers,
                                           OptionalTensor segments, OptionalTensor keep_indices,
                                           Tensor cu_kept, OptionalTensor cu_rows,
                                           OptionalTensor prefix_lens, OptionalTensor seq_lens,
                                           OptionalTensor seq_starts, std::string layout);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compact_paged_kv_cuda(
    std::vector<Tensor> caches, int64_t num_layers, Tensor block_table, int64_t block_size,
    OptionalTensor segments, OptionalTensor keep_indices, Tensor cu_kept, OptionalTensor cu_rows,
    OptionalTensor prefix_lens, OptionalTensor seq_lens, bool edit_table, OptionalTensor pinned,
    std::string layout);
std::vector<Tensor> boundary_step_cpu(Tensor hidden, OptionalTensor residual, OptionalTensor weight,
                                      double eps, std::vector<Tensor> others,
                                      OptionalTensor segments, OptionalTensor keep_indices,
                                      OptionalTensor cu_seqlens, OptionalTensor spans,
                                      std::vector<int64_t> keep, std::string pattern,
                                      int64_t max_height, int64_t num_tokens);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_step_cpu(
    Tensor hidden, OptionalTensor residual, OptionalTensor weight, double eps,
    std::vector<Tensor> others, OptionalTensor segments, OptionalTensor keep_indices,
    OptionalTensor cu_seqlens, OptionalTensor spans, std::vector<int64_t> keep, std::string pattern,
    int64_t max_height, int64_t num_tokens, std::vector<Tensor> caches, int64_t num_layers,
    OptionalTensor block_table, int64_t block_size, OptionalTensor cache_segments,
    OptionalTensor cache_keep_indices, Tensor cu_kept, OptionalTensor cu_rows,
    OptionalTensor prefix_lens, OptionalTensor seq_lens, OptionalTensor seq_starts, bool edit_table,
    OptionalTensor pinned, std::string layout, std::vector<Tensor> outs);

#if defined(ADSC_WITH_CUDA)

Tensor downsample_cuda(Tensor x, OptionalTensor segments, OptionalTensor keep_indices,
                       int64_t num_tokens);
std::vector<Tensor> downsample_many_cuda(std::vector<Tensor> xs, OptionalTensor segments,
                                         OptionalTensor keep_indices, int64_t num_tokens);
Tensor upsample_grad_cuda(Tensor grad, OptionalTensor segments, OptionalTensor keep_indices,
                          int64_t num_rows);
std::tuple<Tensor, Tensor> downsample_add_rms_norm_cuda(Tensor x, Tensor residual, Tensor weight,
                                                        OptionalTensor segments,
                                                        OptionalTensor keep_indices,
                                                        int64_t num_tokens, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rebuild_metadata_cuda(
    Tensor cu_seqlens, Tensor spans, std::vector<int64_t> keep, std::string pattern,
    int64_t max_height);
std::vector<Tensor> boundary_step_cuda(Tensor hidden, OptionalTensor residual,
                                       OptionalTensor weight, double eps,
                                       std::vector<Tensor> others, OptionalTensor segments,
                                       OptionalTensor keep_indices, OptionalTensor cu_seqlens,
                                       OptionalTensor spans, std::vector<int64_t> keep,
                                       std::string pattern, int64_t max_height, int64_t num_tokens);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_step_cuda(
    Tensor hidden, OptionalTensor residual, OptionalTensor weight, double eps,
    std::vector<Tensor> others, OptionalTensor segments, OptionalTensor keep_indices,
    OptionalTensor cu_seqlens, OptionalTensor spans, std::vector<int64_t> keep, std::string pattern,
    int64_t max_height, int64_t num_tokens, std::vector<Tensor> caches, int64_t num_layers,
    OptionalTensor block_table, int64_t block_size, OptionalTensor cache_segments,
    OptionalTensor cache_keep_indices, Tensor cu_kept, OptionalTensor cu_rows,
    OptionalTensor prefix_lens, OptionalTensor seq_lens, OptionalTensor seq_starts, bool edit_table,
    OptionalTensor pinned, std::string layout, std::vector<Tensor> outs);

#endif

}  // namespace adsc::ops
