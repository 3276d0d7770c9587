// The operators that run CUDA C++.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace vattn::cuda {

// kept_tokens (B, G+K, C), kept_positions (B, K) and kept_index (B, K), int64; of tokens (B, G+N, C), whose last axis is
// contiguous, and float32 importance (B, N).
std::tuple<at::Tensor, at::Tensor, at::Tensor> select_tokens(const at::Tensor& tokens, const at::Tensor& importance,
                                                             int64_t keep, const std::optional<at::Tensor>& positions,
                                                             int64_t num_global);

}  // namespace vattn::cuda
