// vattn::merge_attention, its backward and its tangent on the CPU.
#include "host.h"

namespace vattn {
namespace {

constexpr const char* OP = "merge_attention";

// The rows of x as the kernels find them: of a view or a copy, where it has more axes than they support.
Tensor with_few_axes(const Tensor& x) {
  if (x.dim() - 1 <= Rows::MAX_AXES) return with_rows(x);
  int64_t rows = 1;
  for (int64_t size : x.sizes().slice(0, x.dim() - 1)) rows *= size;
  return with_rows(torch::stable::reshape(x, {rows, x.size(-1)}));
}

Rows rows(const Tensor& x) {
  Rows r;
  r.data = x.data_ptr();
  for (int64_t axis = 0; axis < x.dim() - 1; ++axis) r.strides[axis] = x.stride(axis);
  return r;
}

// What was written to the rows of x, which are in a copy if it is not laid out as the kernels want it.
void copy_back(Tensor& x, const Tensor& written) {
  if (x.data_ptr() == written.data_ptr()) return;
  const Sizes sizes = x.sizes();
  torch::stable::copy_(x, torch::stable::reshape(written, {sizes.begin(), sizes.end()}));
}

// The tensors of a list, kept alive beside what the kernels take of them.
struct Outs {
  Tensors tensors;
  std::vector<Rows> parts;
  explicit Outs(const Tensors& list) {
    for (const Tensor& x : list) parts.push_back(rows(tensors.emplace_back(with_few_axes(x))));
  }
};
struct Lses {
  Tensors tensors;
  std::vector<float*> parts;
  explicit Lses(const Tensors& list) {
    for (const Tensor& x : list) parts.push_back(floats(tensors.emplace_back(contiguous(x, ScalarType::Float))));
  }
};

// List `name` must have `size` elements, each of these sizes and this dtype.
void check_list(Name name, const Tensors& list, size_t size, Sizes sizes, ScalarType dtype) {
  check_value(list.size() == size, OP, ": ", name, " must have ", size, " elements, got ", list.size());
  for (size_t i = 0; i < size; ++i) check_tensor(OP, {name.name, (int64_t)i}, list[i], sizes, dtype);
}

inline Sizes of_rows(const Tensor& out) { return out.sizes().slice(0, out.dim() - 1); }

void check_parts(const Tensors& outs, const Tensors& lses) {
  check_value(!outs.empty(), OP, ": outs must have at least one element, got none");
  const Tensor& first = outs[0];
  dtype_of(OP, "outs[0]", first);
  check_value(first.dim() >= 1 && first.size(-1) <= MergeAttention::MAX_D, OP,
              ": head_dim must be at most ", MergeAttention::MAX_D, ", got outs[0].shape=", first.sizes());
  checked_product(OP, "outs[0].shape", first.sizes());
  check_list("outs", outs, outs.size(), first.sizes(), first.scalar_type());
  check_list("lses", lses, outs.size(), of_rows(first), ScalarType::Float);
}

MergeAttention arguments(const Outs& outs, const Lses& lses) {
  const Tensor& first = outs.tensors[0];
  MergeAttention a{};
  a.dtype = dtype_of(OP, "outs[0]", first);
  a.parts = (int64_t)outs.parts.size();
  a.rows = lses.tensors[0].numel();
  a.D = first.size(-1);
  a.axes = first.dim() - 1;
  for (int64_t axis = 0; axis < a.axes; ++axis) a.sizes[axis] = first.size(axis);
  a.outs = outs.parts.data();
  a.lses = lses.parts.data();
  return a;
}

std::tuple<Tensors, Tensors> backward(
    const Tensor& grad_out_, const MaybeTensor& grad_lse_, const Tensors& outs_,
    const Tensors& lses_, const Tensor& out_, const Tensor& lse_) {
  check_parts(outs_, lses_);
  const Sizes sizes = outs_[0].sizes(), numbers = of_rows(outs_[0]);
  for (auto& [name, x] : {std::pair("grad_out", &grad_out_), std::pair("out", &out_)})
    check_tensor(OP, name, *x, sizes, outs_[0].scalar_type());
  check_tensor(OP, "lse", lse_, numbers, ScalarType::Float);
  if (grad_lse_.has_value()) check_tensor(OP, "grad_lse", *grad_lse_, numbers, ScalarType::Float);
  Outs outs(outs_);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  Tensor grad_out = with_few_axes(grad_out_), out = with_few_axes(out_), lse = contiguous(lse_, ScalarType::Float);
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

std::tuple<Tensor, Tensor> tangent(const Tensors& out_tangents, const Tensors& lse_tangents, const Tensors& outs_,
                                   const Tensors& lses_, const Tensor& out, const Tensor& lse_) {
  check_parts(outs_, lses_);
  const Sizes sizes = outs_[0].sizes(), numbers = of_rows(outs_[0]);
  check_list("out_tangents", out_tangents, outs_.size(), sizes, outs_[0].scalar_type());
  check_list("lse_tangents", lse_tangents, outs_.size(), numbers, ScalarType::Float);
  check_tensor(OP, "out", out, sizes, outs_[0].scalar_type());
  check_tensor(OP, "lse", lse_, numbers, ScalarType::Float);
  Outs outs(outs_), tangents(out_tangents);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  Lses lse_parts(lse_tangents);
  Tensor lse = contiguous(lse_, ScalarType::Float), lse_tangent = empty(lse.sizes(), ScalarType::Float);
  Tensor out_tangent = torch::stable::empty_like(out), stored = with_few_axes(out_tangent);
  a.lse = floats(lse), a.lse_tangent = floats(lse_tangent);
  a.out_tangents = tangents.parts.data(), a.lse_tangents = lse_parts.parts.data();
  a.out_tangent = rows(stored);
  run(kernels().merge_tangent, a, a.rows);
  copy_back(out_tangent, stored);
  return {out_tangent, lse_tangent};
}

}  // namespace

std::tuple<Tensor, Tensor> merge_attention(const Tensors& outs_, const Tensors& lses_) {
  check_parts(outs_, lses_);
  Outs outs(outs_);
  Lses lses(lses_);
  MergeAttention a = arguments(outs, lses);
  Tensor out = torch::stable::empty_like(outs_[0]), stored = with_few_axes(out);
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
