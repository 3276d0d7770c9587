// The Python module vattn._C_cuda. Importing it registers the operators that run CUDA C++ with PyTorch's dispatcher,
// through PyTorch's stable ABI.
#include <pybind11/pybind11.h>
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

// kept_tokens (B, G+K, C), kept_positions (B, K) and kept_index (B, K), int64; of tokens (B, G+N, C) and importance
// (B, N).
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& tokens_, const Tensor& importance_, int64_t keep,
                                           const std::optional<Tensor>& positions, int64_t num_global) {
  torch::stable::accelerator::DeviceGuard guard(tokens_.get_device_index());
  Tensor tokens = tokens_.size(2) <= 1 || tokens_.stride(2) == 1 ? tokens_ : torch::stable::contiguous(tokens_);
  Tensor importance = torch::stable::to(importance_, ScalarType::Float);
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
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tokens.get_device_index(), &stream));
  const cudaError_t error = select_tokens(a, (cudaStream_t)stream);
  STD_TORCH_CHECK(error == cudaSuccess, "select_tokens: ", cudaGetErrorString(error));
  return {kept_tokens, kept_positions, kept_index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CUDA, m) { m.impl("select_tokens", TORCH_BOX(forward)); }

}  // namespace vattn

PYBIND11_MODULE(_C_cuda, m) { m.doc() = "Compiled CUDA C++ kernels of vattn."; }
