// vattn::merge_attention, its backward and its tangent on the CPU.
#include "host.h"

namespace vattn {
namespace {

Rows rows(const Tensor& x) {
  check_value(x.dim() - 1 <= Rows::MAX_AXES, "merge_attention: outs must have at most ", Rows::MAX_AXES + 1,
              " axes, got ", x.sizes());
  Rows r;
  r.data = x.data_ptr();
  for (int64_t axis = 0; axis < x.dim() - 1; ++axis) r.strides[axis] = x.stride(axis);
  return r;
}

// What was written to the rows of x, which are in a copy if those of x are not contiguous.
void copy_back(Tensor& x, const Tensor& written) {
  if (x.data_ptr() != written.data_ptr()) torch::stable::copy_(x, written);
}

// The tensors of a list, kept alive beside what the kernels take of them.
struct Outs {
  Tensors tensors;
  std::vector<Rows> parts;
  explicit Outs(const Tensors& list) {
    for (const Tensor& x : list) parts.push_back(rows(tensors.emplace_back(with_rows(x))));
  }
};
struct Lses {
  Tensors tensors;
  std::vector<float*> parts;
  explicit Lses(const Tensors& list) {
    for (const Tensor& x : list) parts.push_back(floats(tensors.emplace_back(contiguous(x, ScalarType::Float))));
  }
};

MergeAttention arguments(const Outs& outs, const Lses& lses) {
  check_value(!outs.parts.empty() && outs.parts.size() == lses.parts.size(),
              "merge_attention: outs and lses must be as many, and at least one");
  const Tensor& first = outs.tensors[0];
  MergeAttention a{};
  a.dtype = dtype_of("merge_attention", first);
  a.parts = (int64_t)outs.parts.size();
  a.rows = lses.tensors[0].numel();
  a.D = first.size(-1);
  a.axes = first.dim() - 1;
  check_value(a.D <= MergeAttention::MAX_D, "merge_attention: head_dim must be at most ", MergeAttention::MAX_D,
              ", got head_dim=", a.D);
  for (const Tensor& x : outs.tensors)
    check_value(x.sizes().equals(first.sizes()), "merge_attention: outs must have one shape");
  for (const Tensor& x : lses.tensors)
    check_value(x.numel() == a.rows, "merge_attention: lses must have one number for each row of outs");
  for (int64_t axis = 0; axis < a.axes; ++axis) a.sizes[axis] = first.size(axis);
  a.outs = outs.parts.data();
  a.lses = lses.parts.data();
  return a;
}

std::tuple<Tensors, Tensors> backward(
    const Tensor& grad_out_, const MaybeTensor& grad_lse_, const Tensors& outs_,
    const Tensors& lses_, const Tensor& out_, const Tensor& lse_) {
  Outs outs(outs_);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = contiguous(lse_, ScalarType::Float);
  Tensors grad_outs, grad_lses;
  for (const Tensor& x : outs_) grad_outs.push_back(torch::stable::empty_like(x));
  for (const Tensor& x : lses_) grad_lses.push_back(empty(x.sizes(), ScalarType::Float));
  Outs grad_out_parts(grad_outs);
  Lses grad_lse_parts(grad_lses);
  MaybeTensor grad_lse;
  if (grad_lse_.has_value()) grad_lse = contiguous(*grad_lse_, ScalarType::Float);
  a.out = rows(out);
  a.lse = floats(lse);
  a.grad_out = rows(grad_out);
  a.grad_lse = grad_lse.has_value() ? floats(*grad_lse) : nullptr;
  a.grad_outs = grad_out_parts.parts.data();
  a.grad_lses = grad_lse_parts.parts.data();
  run(kernels().merge_backward, a, a.rows);
  for (size_t i = 0; i < grad_outs.size(); ++i)
    copy_back(grad_outs[i], grad_out_parts.tensors[i]);
  return {grad_outs, grad_lses};
}

std::tuple<Tensor, Tensor> tangent(const Tensors& out_tangents, const Tensors& lse_tangents,
                                           const Tensors& outs_, const Tensors& lses_, const Tensor& out,
                                           const Tensor& lse_) {
  const char* op = "merge_attention";
  Outs outs(outs_), tangents(out_tangents);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  check_value(out_tangents.size() == outs_.size() && lse_tangents.size() == outs_.size(), op,
              ": out_tangents and lse_tangents must be as many as outs (", outs_.size(), "), got ", out_tangents.size(),
              " and ", lse_tangents.size());
  for (size_t i = 0; i < outs_.size(); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    check_like(op, "out_tangents" + index, out_tangents[i], "outs" + index, outs_[i].sizes(), outs_[i].scalar_type());
    check_like(op, "lse_tangents" + index, lse_tangents[i], "lses" + index, lses_[i].sizes(), ScalarType::Float);
  }
  check_like(op, "out", out, "outs[0]", outs_[0].sizes(), outs_[0].scalar_type());
  check_like(op, "lse", lse_, "lses[0]", lses_[0].sizes(), ScalarType::Float);
  Lses lse_parts(lse_tangents);
  Tensor lse = contiguous(lse_, ScalarType::Float), lse_tangent = empty(lse.sizes(), ScalarType::Float);
  Tensor out_tangent = torch::stable::empty_like(out), stored = with_rows(out_tangent);
  a.lse = floats(lse), a.lse_tangent = floats(lse_tangent);
  a.out_tangents = tangents.parts.data(), a.lse_tangents = lse_parts.parts.data();
  a.out_tangent = rows(stored);
  run(kernels().merge_tangent, a, a.rows);
  copy_back(out_tangent, stored);
  return {out_tangent, lse_tangent};
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attention(const Tensors& outs_, const Tensors& lses_) {
  Outs outs(outs_);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  Tensor out = torch::stable::empty_like(outs_[0]), stored = with_rows(out);
  Tensor lse = empty(lses_[0].sizes(), ScalarType::Float);
  a.out = rows(stored);
  a.lse = floats(lse);
  run(kernels().merge_forward, a, a.rows);
  copy_back(out, stored);
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  VATTN_OPERATOR(m, "merge_attention", merge_attention);
  VATTN_OPERATOR(m, "merge_attention_backward", backward);
  VATTN_OPERATOR(m, "merge_attention_jvp", tangent);
}

}  // namespace vattn
