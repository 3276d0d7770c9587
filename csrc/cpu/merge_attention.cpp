// vattn::merge_attention and its backward on the CPU.
#include <torch/library.h>

#include <vector>

#include "host.h"

namespace vattn {
namespace {

// Parts as the kernels take them: contiguous, and by pointer.
template <class T>
struct Parts {
  std::vector<at::Tensor> tensors;
  std::vector<T*> pointers;
  explicit Parts(at::TensorList list) {
    for (const at::Tensor& x : list) {
      tensors.push_back(x.contiguous());
      pointers.push_back((T*)tensors.back().data_ptr());
    }
  }
};

std::vector<at::Tensor> empty_like(at::TensorList list) {
  std::vector<at::Tensor> empty;
  for (const at::Tensor& x : list) empty.push_back(at::empty(x.sizes(), x.options()));
  return empty;
}

MergeAttention arguments(const Parts<void>& outs, const Parts<float>& lses) {
  TORCH_CHECK_VALUE(!outs.tensors.empty() && outs.tensors.size() == lses.tensors.size(),
                    "merge_attention: outs and lses must be as many, and at least one");
  MergeAttention a{};
  const at::Tensor& first = outs.tensors[0];
  a.dtype = dtype_of("merge_attention", first);
  a.parts = (int64_t)outs.tensors.size();
  a.D = first.size(-1);
  TORCH_CHECK_VALUE(a.D <= MergeAttention::MAX_D, "merge_attention: head_dim must be at most ", MergeAttention::MAX_D,
                    ", got head_dim=", a.D);
  a.rows = lses.tensors[0].numel();
  a.outs = outs.pointers.data();
  a.lses = lses.pointers.data();
  return a;
}

std::tuple<at::Tensor, at::Tensor> forward(at::TensorList outs_, at::TensorList lses_) {
  Parts<void> outs(outs_);
  Parts<float> lses(lses_);
  MergeAttention a = arguments(outs, lses);
  at::Tensor out = at::empty(outs_[0].sizes(), outs_[0].options()), lse = at::empty(lses_[0].sizes(), lses_[0].options());
  a.out = out.data_ptr();
  a.lse = lse.data_ptr<float>();
  run(kernels().merge_forward, a, a.rows);
  return {out, lse};
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> backward(
    const at::Tensor& grad_out_, const std::optional<at::Tensor>& grad_lse_, at::TensorList outs_,
    at::TensorList lses_, const at::Tensor& out_, const at::Tensor& lse_) {
  Parts<void> outs(outs_);
  Parts<float> lses(lses_);
  MergeAttention a = arguments(outs, lses);
  at::Tensor grad_out = grad_out_.contiguous(), out = out_.contiguous(), lse = lse_.contiguous(), grad_lse;
  std::vector<at::Tensor> grad_outs = empty_like(outs_), grad_lses = empty_like(lses_);
  Parts<void> grad_out_parts(grad_outs);
  Parts<float> grad_lse_parts(grad_lses);
  a.grad_out = grad_out.data_ptr();
  a.out = out.data_ptr();
  a.lse = lse.data_ptr<float>();
  if (grad_lse_.has_value()) {
    grad_lse = grad_lse_->contiguous();
    a.grad_lse = grad_lse.data_ptr<float>();
  }
  a.grad_outs = grad_out_parts.pointers.data();
  a.grad_lses = grad_lse_parts.pointers.data();
  run(kernels().merge_backward, a, a.rows);
  return {grad_outs, grad_lses};
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("merge_attention", forward);
  m.impl("merge_attention_backward", backward);
}

}  // namespace vattn
