// vattn::leap_attention, its backward and its tangent on the CPU.
#include <torch/library.h>

#include "host.h"

namespace vattn {
namespace {

LeapAttention arguments(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t leap,
                        int64_t group_size, int64_t fold_div, double dropout_p, const std::optional<at::Tensor>& seed,
                        double scale) {
  LeapAttention a{};
  set_attention("leap_attention", a, query, dropout_p, seed, scale);
  TORCH_CHECK_VALUE(leap >= 1, "leap_attention: leap must be at least 1, got leap=", leap);
  TORCH_CHECK_VALUE(group_size >= 1, "leap_attention: group_size must be at least 1, got group_size=", group_size);
  for (const at::Tensor& x : {key, value})
    TORCH_CHECK_VALUE(x.sizes() == query.sizes() && x.scalar_type() == query.scalar_type(),
                      "leap_attention: query, key and value must have one shape and dtype");
  a.T = query.size(2), a.N = query.size(3);
  a.leap = std::min(leap, std::max<int64_t>(a.T, 1)), a.group_size = std::min(group_size, std::max<int64_t>(a.T, 1));
  a.fold = fold_div > 0 ? a.D / fold_div : 0;
  a.components = a.B * a.H * a.groups();
  a.max_queries = a.max_keys = a.group_size * a.N;
  a.query = video(query), a.key = video(key), a.value = video(value);
  return a;
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_,
                                           int64_t leap, int64_t group_size, int64_t fold_div, double dropout_p,
                                           const std::optional<at::Tensor>& seed, double scale) {
  at::Tensor query = with_rows(query_), key = with_rows(key_), value = with_rows(value_);
  LeapAttention a = arguments(query, key, value, leap, group_size, fold_div, dropout_p, seed, scale);
  at::Tensor out = empty_rows(query), lse = empty_sums(query);
  if (out.numel() == 0) return {out, lse};
  a.out = video(out);
  a.lse = lse.data_ptr<float>();
  a.panels = panels_of_item(a, kernels().tile);
  run_forward(kernels().leap_attention, a);
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out_, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query_,
    const at::Tensor& key_, const at::Tensor& value_, const at::Tensor& out_, const at::Tensor& lse_, int64_t leap,
    int64_t group_size, int64_t fold_div, double dropout_p, const std::optional<at::Tensor>& seed, double scale) {
  at::Tensor query = with_rows(query_), key = with_rows(key_), value = with_rows(value_);
  at::Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = lse_.contiguous();
  LeapAttention a = arguments(query, key, value, leap, group_size, fold_div, dropout_p, seed, scale);
  at::Tensor grad_query = empty_rows(query), grad_key = empty_rows(query), grad_value = empty_rows(query);
  if (query.numel() == 0) return {grad_query, grad_key, grad_value};
  at::Tensor delta = start_delta(lse, grad_lse);
  a.out = video(out), a.grad_out = video(grad_out);
  a.lse = lse.data_ptr<float>(), a.delta = delta.data_ptr<float>();
  a.grad_query = video(grad_query), a.grad_key = video(grad_key), a.grad_value = video(grad_value);
  run_backward(kernels().leap_attention, a);
  return {grad_query, grad_key, grad_value};
}

std::tuple<at::Tensor, at::Tensor> tangent(
    const at::Tensor& query_tangent, const at::Tensor& key_tangent, const at::Tensor& value_tangent,
    const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, const at::Tensor& out,
    const at::Tensor& lse, int64_t leap,
    int64_t group_size, int64_t fold_div, double dropout_p, const std::optional<at::Tensor>& seed, double scale) {
  at::Tensor query = with_rows(query_), key = with_rows(key_), value = with_rows(value_);
  LeapAttention a = arguments(query, key, value, leap, group_size, fold_div, dropout_p, seed, scale);
  return run_tangent("leap_attention", kernels().leap_attention, a, video, query_tangent, key_tangent, value_tangent,
                     query, key, value, out, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("leap_attention", forward);
  m.impl("leap_attention_backward", backward);
  m.impl("leap_attention_jvp", tangent);
}

}  // namespace vattn
