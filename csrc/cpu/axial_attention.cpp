// vattn::axial_attention, its backward and its tangent on the CPU.
#include <torch/library.h>

#include "host.h"

namespace vattn {
namespace {

Grid grid(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

AxialAttention arguments(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, double dropout_p,
                         const std::optional<at::Tensor>& seed, double scale) {
  TORCH_CHECK_VALUE(query.dim() == 6, "axial_attention: query must be (B, H, outer, line, inner, D)");
  AxialAttention a{};
  set_attention("axial_attention", a, query, dropout_p, seed, scale);
  for (const at::Tensor& x : {key, value})
    TORCH_CHECK_VALUE(x.sizes() == query.sizes() && x.scalar_type() == query.scalar_type(),
                      "axial_attention: query, key and value must have one shape and dtype");
  a.outer = query.size(2), a.line = query.size(3), a.inner = query.size(4);
  constexpr int64_t ROWS_WORTH_A_PANEL = 16;  // products of fewer rows take as long
  a.lines = std::max<int64_t>(1, ROWS_WORTH_A_PANEL / std::max<int64_t>(a.line, 1));
  a.components = a.B * a.H * parts(a.outer * a.inner, a.lines);
  a.max_queries = a.max_keys = a.lines * a.line;
  a.query = grid(query), a.key = grid(key), a.value = grid(value);
  return a;
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_,
                                           double dropout_p, const std::optional<at::Tensor>& seed, double scale) {
  at::Tensor query = with_rows(query_), key = with_rows(key_), value = with_rows(value_);
  AxialAttention a = arguments(query, key, value, dropout_p, seed, scale);
  at::Tensor out = empty_rows(query), lse = empty_sums(query);
  if (out.numel() == 0) return {out, lse};
  a.out = grid(out);
  a.lse = lse.data_ptr<float>();
  a.panels = panels_of_item(a, kernels().tile);
  run_forward(kernels().axial_attention, a);
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out_, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query_,
    const at::Tensor& key_, const at::Tensor& value_, const at::Tensor& out_, const at::Tensor& lse_, double dropout_p,
    const std::optional<at::Tensor>& seed, double scale) {
  at::Tensor query = with_rows(query_), key = with_rows(key_), value = with_rows(value_);
  at::Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = lse_.contiguous();
  AxialAttention a = arguments(query, key, value, dropout_p, seed, scale);
  at::Tensor grad_query = empty_rows(query), grad_key = empty_rows(query), grad_value = empty_rows(query);
  if (query.numel() == 0) return {grad_query, grad_key, grad_value};
  at::Tensor delta = start_delta(lse, grad_lse);
  a.out = grid(out), a.grad_out = grid(grad_out);
  a.lse = lse.data_ptr<float>(), a.delta = delta.data_ptr<float>();
  a.grad_query = grid(grad_query), a.grad_key = grid(grad_key), a.grad_value = grid(grad_value);
  run_backward(kernels().axial_attention, a);
  return {grad_query, grad_key, grad_value};
}

std::tuple<at::Tensor, at::Tensor> tangent(
    const at::Tensor& query_tangent, const at::Tensor& key_tangent, const at::Tensor& value_tangent,
    const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, const at::Tensor& out,
    const at::Tensor& lse, double dropout_p, const std::optional<at::Tensor>& seed, double scale) {
  at::Tensor query = with_rows(query_), key = with_rows(key_), value = with_rows(value_);
  AxialAttention a = arguments(query, key, value, dropout_p, seed, scale);
  return run_tangent("axial_attention", kernels().axial_attention, a, grid, query_tangent, key_tangent, value_tangent,
                     query, key, value, out, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("axial_attention", forward);
  m.impl("axial_attention_backward", backward);
  m.impl("axial_attention_jvp", tangent);
}

}  // namespace vattn
