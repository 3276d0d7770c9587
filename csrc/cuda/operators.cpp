// The operators that run CUDA C++, for PyTorch's dispatcher, through PyTorch's stable ABI.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "select_tokens.h"

namespace vattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `torch.ops` bypasses the public function and its checks.
void check(bool holds, const char* must) { STD_TORCH_CHECK(holds, "select_tokens: ", must); }

void check_arguments(const Tensor& tokens, const Tensor& importance, int64_t keep,
                     const std::optional<Tensor>& positions, int64_t num_global) {
  auto beside = [&](const Tensor& x) {
    return x.defined() && x.is_cuda() && x.get_device_index() == tokens.get_device_index();
  };
  check(tokens.defined() && tokens.is_cuda() && tokens.dim() == 3, "tokens must have shape (B, G+N, C), on a GPU");
  const ScalarType dtype = tokens.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
        "tokens must be float32, bfloat16 or float16");
  check(0 <= num_global && num_global <= tokens.size(1), "num_global must be between 0 and the number of tokens");
  const int64_t B = tokens.size(0), N = tokens.size(1) - num_global;
  check(N < (int64_t)1 << 31, "there must be fewer than 2**31 tokens");
  check(0 <= keep && keep <= N, "keep must be between 0 and the number of tokens that are not global");
  check(beside(importance) && importance.dim() == 2 && importance.size(0) == B && importance.size(1) == N &&
            importance.scalar_type() == ScalarType::Float,
        "importance must be float32 (B, N), on the device of tokens");
  if (!positions.has_value()) return;
  const int64_t axes = beside(*positions) ? positions->dim() : 0;
  check((axes == 1 || (axes == 2 && positions->size(0) == B)) && positions->size(-1) == N &&
            positions->scalar_type() == ScalarType::Long,
        "positions must be int64 (N,) or (B, N), on the device of tokens");
}

// kept_tokens (B, G+K, C), kept_positions (B, K) and kept_index (B, K), int64; of tokens (B, G+N, C) and importance
// (B, N).
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& tokens_, const Tensor& importance, int64_t keep,
                                           const std::optional<Tensor>& positions, int64_t num_global) {
  check_arguments(tokens_, importance, keep, positions, num_global);
  torch::stable::accelerator::DeviceGuard guard(tokens_.get_device_index());
  Tensor tokens = tokens_.size(2) <= 1 || tokens_.stride(2) == 1 ? tokens_ : torch::stable::contiguous(tokens_);
  const int64_t size = (int64_t)tokens.element_size(), B = tokens.size(0);
  Tensor kept_tokens = torch::stable::new_empty(tokens, {B, num_global + keep, tokens.size(2)});
  Tensor kept_positions = torch::stable::new_empty(tokens, {B, keep}, ScalarType::Long);
  Tensor kept_index = torch::stable::new_empty(tokens, {B, keep}, ScalarType::Long);

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
  a.kept_tokens = (char*)kept_tokens.mutable_data_ptr();
  a.kept_positions = kept_positions.mutable_data_ptr<int64_t>();
  a.kept_index = kept_index.mutable_data_ptr<int64_t>();
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tokens.get_device_index(), &stream));
  const cudaError_t error = select_tokens(a, (cudaStream_t)stream);
  STD_TORCH_CHECK(error == cudaSuccess, "select_tokens: ", cudaGetErrorString(error));
  return {kept_tokens, kept_positions, kept_index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CUDA, m) { m.impl("select_tokens", TORCH_BOX(forward)); }

}  // namespace vattn
