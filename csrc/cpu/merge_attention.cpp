// vattn::merge_attention, its backward and its tangent on the CPU.
#include <torch/library.h>

#include <vector>

#include "host.h"

namespace vattn {
namespace {

Rows rows(const at::Tensor& x) {
  Rows r;
  r.data = x.data_ptr();
  for (int64_t axis = 0; axis < x.dim() - 1; ++axis) r.strides[axis] = x.stride(axis);
  return r;
}

// The tensors of a list, kept alive beside what the kernels take of them.
struct Outs {
  std::vector<at::Tensor> tensors;
  std::vector<Rows> parts;
  explicit Outs(at::TensorList list) {
    for (const at::Tensor& x : list) parts.push_back(rows(tensors.emplace_back(with_rows(x))));
  }
};
struct Lses {
  std::vector<at::Tensor> tensors;
  std::vector<float*> parts;
  explicit Lses(at::TensorList list) {
    for (const at::Tensor& x : list) parts.push_back(tensors.emplace_back(x.contiguous()).data_ptr<float>());
  }
};

MergeAttention arguments(const Outs& outs, const Lses& lses) {
  TORCH_CHECK_VALUE(!outs.parts.empty() && outs.parts.size() == lses.parts.size(),
                    "merge_attention: outs and lses must be as many, and at least one");
  const at::Tensor& first = outs.tensors[0];
  MergeAttention a{};
  a.dtype = dtype_of("merge_attention", first);
  a.parts = (int64_t)outs.parts.size();
  a.rows = lses.tensors[0].numel();
  a.D = first.size(-1);
  a.axes = first.dim() - 1;
  TORCH_CHECK_VALUE(a.D <= MergeAttention::MAX_D, "merge_attention: head_dim must be at most ", MergeAttention::MAX_D,
                    ", got head_dim=", a.D);
  TORCH_CHECK_VALUE(a.axes <= Rows::MAX_AXES, "merge_attention: outs must have at most ", Rows::MAX_AXES + 1,
                    " axes, got outs[0].dim()=", first.dim());
  for (const at::Tensor& x : outs.tensors)
    TORCH_CHECK_VALUE(x.sizes() == first.sizes(), "merge_attention: outs must have one shape");
  for (const at::Tensor& x : lses.tensors)
    TORCH_CHECK_VALUE(x.numel() == a.rows, "merge_attention: lses must have one number for each row of outs");
  for (int64_t axis = 0; axis < a.axes; ++axis) a.sizes[axis] = first.size(axis);
  a.outs = outs.parts.data();
  a.lses = lses.parts.data();
  return a;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> backward(
    const at::Tensor& grad_out_, const std::optional<at::Tensor>& grad_lse_, at::TensorList outs_,
    at::TensorList lses_, const at::Tensor& out_, const at::Tensor& lse_) {
  Outs outs(outs_);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  at::Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = lse_.contiguous();
  std::vector<at::Tensor> grad_outs, grad_lses;
  for (const at::Tensor& x : outs_) grad_outs.push_back(at::empty_like(x));
  for (const at::Tensor& x : lses_) grad_lses.push_back(at::empty(x.sizes(), x.options()));
  Outs grad_out_parts(grad_outs);
  Lses grad_lse_parts(grad_lses);
  at::Tensor grad_lse = grad_lse_.has_value() ? grad_lse_->contiguous() : at::Tensor();
  a.out = rows(out);
  a.lse = lse.data_ptr<float>();
  a.grad_out = rows(grad_out);
  a.grad_lse = grad_lse.defined() ? grad_lse.data_ptr<float>() : nullptr;
  a.grad_outs = grad_out_parts.parts.data();
  a.grad_lses = grad_lse_parts.parts.data();
  run(kernels().merge_backward, a, a.rows);
  for (size_t i = 0; i < grad_outs.size(); ++i)
    if (!grad_outs[i].is_same(grad_out_parts.tensors[i])) grad_outs[i].copy_(grad_out_parts.tensors[i]);
  return {grad_outs, grad_lses};
}

std::tuple<at::Tensor, at::Tensor> tangent(at::TensorList out_tangents, at::TensorList lse_tangents,
                                           at::TensorList outs_, at::TensorList lses_, const at::Tensor& out,
                                           const at::Tensor& lse_) {
  const char* op = "merge_attention";
  Outs outs(outs_), tangents(out_tangents);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  TORCH_CHECK_VALUE(out_tangents.size() == outs_.size() && lse_tangents.size() == outs_.size(), op,
                    ": out_tangents and lse_tangents must be as many as outs (", outs_.size(), "), got ",
                    out_tangents.size(), " and ", lse_tangents.size());
  for (size_t i = 0; i < outs_.size(); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    check_like(op, "out_tangents" + index, out_tangents[i], "outs" + index, outs_[i].sizes(), outs_[i].scalar_type());
    check_like(op, "lse_tangents" + index, lse_tangents[i], "lses" + index, lses_[i].sizes(), at::kFloat);
  }
  check_like(op, "out", out, "outs[0]", outs_[0].sizes(), outs_[0].scalar_type());
  check_like(op, "lse", lse_, "lses[0]", lses_[0].sizes(), at::kFloat);
  Lses lse_parts(lse_tangents);
  at::Tensor lse = lse_.contiguous(), lse_tangent = at::empty(lse.sizes(), lse.options());
  at::Tensor out_tangent = at::empty_like(out), stored = with_rows(out_tangent);
  a.lse = lse.data_ptr<float>(), a.lse_tangent = lse_tangent.data_ptr<float>();
  a.out_tangents = tangents.parts.data(), a.lse_tangents = lse_parts.parts.data();
  a.out_tangent = rows(stored);
  run(kernels().merge_tangent, a, a.rows);
  if (!stored.is_same(out_tangent)) out_tangent.copy_(stored);
  return {out_tangent, lse_tangent};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> merge_attention(at::TensorList outs_, at::TensorList lses_) {
  Outs outs(outs_);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  at::Tensor out = at::empty_like(outs_[0]), stored = with_rows(out), lse = at::empty(lses_[0].sizes(), lses_[0].options());
  a.out = rows(stored);
  a.lse = lse.data_ptr<float>();
  run(kernels().merge_forward, a, a.rows);
  if (!stored.is_same(out)) out.copy_(stored);
  return {out, lse};
}

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("merge_attention", merge_attention);
  m.impl("merge_attention_backward", backward);
  m.impl("merge_attention_jvp", tangent);
}

}  // namespace vattn
