// Between PyTorch's tensors and the CUDA C++ kernels.
#include "operators.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "select_tokens.h"

namespace vattn::cuda {

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_tokens(const at::Tensor& tokens, const at::Tensor& importance,
                                                             int64_t keep, const std::optional<at::Tensor>& positions,
                                                             int64_t num_global) {
  TORCH_CHECK_TYPE(importance.scalar_type() == at::kFloat, "select_tokens: importance must be float32, got ",
                   importance.scalar_type());
  TORCH_CHECK_VALUE(tokens.size(2) <= 1 || tokens.stride(2) == 1, "select_tokens: the rows of tokens must be contiguous");
  c10::cuda::CUDAGuard guard(tokens.device());
  int64_t size = tokens.element_size(), B = tokens.size(0);
  at::Tensor kept_tokens = at::empty({B, num_global + keep, tokens.size(2)}, tokens.options());
  at::Tensor kept_positions = at::empty({B, keep}, tokens.options().dtype(at::kLong));
  at::Tensor kept_index = at::empty_like(kept_positions);

  SelectTokens a{};
  a.B = B, a.G = num_global, a.N = importance.size(1), a.K = keep;
  a.tokens = (const char*)tokens.const_data_ptr();
  a.tokens_batch = size * tokens.stride(0), a.tokens_step = size * tokens.stride(1);
  a.row_bytes = size * tokens.size(2);
  a.importance = importance.const_data_ptr<float>();
  a.importance_batch = importance.stride(0), a.importance_step = importance.stride(1);
  if (positions.has_value()) {
    a.positions = positions->const_data_ptr<int64_t>();
    a.positions_batch = positions->dim() == 2 ? positions->stride(0) : 0;
    a.positions_step = positions->stride(-1);
  }
  a.kept_tokens = (char*)kept_tokens.data_ptr();
  a.kept_positions = kept_positions.data_ptr<int64_t>();
  a.kept_index = kept_index.data_ptr<int64_t>();
  C10_CUDA_CHECK(vattn::select_tokens(a, c10::cuda::getCurrentCUDAStream()));
  return {kept_tokens, kept_positions, kept_index};
}

}  // namespace vattn::cuda
