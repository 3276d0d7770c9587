// vattn::node_sparse_attention, its backward and its tangent on the CPU.
#include <torch/library.h>

#include <vector>

#include "host.h"

namespace vattn {
namespace {

// The arguments of the kernels, and what they point to.
struct Call {
  NodeSparseAttention a{};
  at::Tensor query, key, value, kept;
  bool repeats = false;  // whether a sample keeps a key twice

  Call(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, const at::Tensor& kept_,
       double dropout_p, const std::optional<at::Tensor>& seed, double scale)
      : query(with_rows(query_)), key(with_rows(key_)), value(with_rows(value_)),
        kept(kept_.to(at::kLong).contiguous()) {
    const char* op = "node_sparse_attention";
    set_attention(op, a, query, dropout_p, seed, scale);
    TORCH_CHECK_VALUE(key.sizes() == value.sizes() && key.dim() == 4 && key.size(0) == a.B && key.size(1) == a.H &&
                          key.size(3) == a.D && key.scalar_type() == query.scalar_type() &&
                          value.scalar_type() == query.scalar_type(),
                      op, ": key and value must fit the query in all but their length");
    TORCH_CHECK_VALUE(kept.dim() == 2 && kept.size(0) == a.B, op, ": kept must have shape (", a.B, ", K), got ",
                      kept.sizes());
    const int64_t Lk = key.size(2), K = kept.size(1);
    const int64_t* index = kept.data_ptr<int64_t>();
    std::vector<int64_t> seen(Lk, -1);  // the last sample that keeps a key
    for (int64_t i = 0; i < kept.numel(); ++i) {
      TORCH_CHECK_VALUE(0 <= index[i] && index[i] < Lk, op, ": kept must be from 0 to below the number of keys (", Lk,
                        "), got kept[", i / K, ", ", i % K, "]=", index[i]);
      repeats |= seen[index[i]] == i / K;
      seen[index[i]] = i / K;
    }
    a.kept = index;
    a.Lq = a.max_queries = query.size(2), a.max_keys = K;
    a.components = a.B * a.H;
    a.query = video(query), a.key = video(key), a.value = video(value);
  }
};

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           const at::Tensor& kept, double dropout_p,
                                           const std::optional<at::Tensor>& seed, double scale) {
  Call call(query, key, value, kept, dropout_p, seed, scale);
  at::Tensor out = empty_rows(call.query), lse = empty_sums(call.query);
  if (out.numel() == 0) return {out, lse};
  call.a.out = video(out), call.a.lse = lse.data_ptr<float>();
  call.a.panels = panels_of_item(call.a, kernels().tile);
  run_forward(kernels().node_sparse_attention, call.a);
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out_, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out_, const at::Tensor& lse_,
    const at::Tensor& kept, double dropout_p, const std::optional<at::Tensor>& seed, double scale) {
  Call call(query, key, value, kept, dropout_p, seed, scale);
  NodeSparseAttention& a = call.a;
  at::Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = lse_.contiguous();
  at::Tensor grad_query = empty_rows(call.query);
  at::Tensor grad_key = empty_rows(call.key).zero_(), grad_value = empty_rows(call.key).zero_();
  if (a.components * a.Lq * a.max_keys == 0) return {grad_query.zero_(), grad_key, grad_value};
  at::Tensor delta = start_delta(lse, grad_lse), keys = grad_key, values = grad_value;
  a.compact = call.repeats;  // what is stored twice must add up
  if (a.compact) keys = at::empty({a.B, a.H, a.max_keys, a.D}, at::kFloat), values = at::empty_like(keys);
  a.out = video(out), a.grad_out = video(grad_out), a.grad_query = video(grad_query);
  a.grad_key = video(keys), a.grad_value = video(values);
  a.lse = lse.data_ptr<float>(), a.delta = delta.data_ptr<float>();
  run_backward(kernels().node_sparse_attention, a);
  if (a.compact) {
    at::Tensor index = call.kept.view({a.B, 1, a.max_keys, 1}).expand(keys.sizes());
    auto add = [&](const at::Tensor& grad, const at::Tensor& parts) {
      grad.copy_(at::zeros(grad.sizes(), at::kFloat).scatter_add_(2, index, parts));
    };
    add(grad_key, keys), add(grad_value, values);
  }
  return {grad_query, grad_key, grad_value};
}

std::tuple<at::Tensor, at::Tensor> tangent(
    const at::Tensor& query_tangent, const at::Tensor& key_tangent, const at::Tensor& value_tangent,
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& kept, double dropout_p, const std::optional<at::Tensor>& seed,
    double scale) {
  Call call(query, key, value, kept, dropout_p, seed, scale);
  NodeSparseAttention& a = call.a;
  return run_tangent("node_sparse_attention", kernels().node_sparse_attention, a, video, query_tangent, key_tangent,
                     value_tangent, call.query, call.key, call.value, out, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("node_sparse_attention", forward);
  m.impl("node_sparse_attention_backward", backward);
  m.impl("node_sparse_attention_jvp", tangent);
}

}  // namespace vattn
