// vattn::leap_attention and its backward on the CPU.
#include <torch/library.h>

#include "host.h"

namespace vattn {
namespace {

LeapAttention arguments(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t leap,
                        int64_t group_size, int64_t fold_div, double dropout_p, const std::optional<at::Tensor>& seed,
                        double scale) {
  LeapAttention a{};
  a.dtype = dtype_of("leap_attention", query);
  a.B = query.size(0), a.H = query.size(1), a.T = query.size(2), a.N = query.size(3), a.D = query.size(4);
  TORCH_CHECK_VALUE(a.D <= 256, "leap_attention: head_dim must be at most 256, got head_dim=", a.D);
  TORCH_CHECK_VALUE(leap >= 1, "leap_attention: leap must be at least 1, got leap=", leap);
  TORCH_CHECK_VALUE(group_size >= 1, "leap_attention: group_size must be at least 1, got group_size=", group_size);
  for (const at::Tensor& x : {key, value})
    TORCH_CHECK_VALUE(x.sizes() == query.sizes() && x.scalar_type() == query.scalar_type(),
                      "leap_attention: query, key and value must have one shape and dtype");
  a.leap = leap, a.group_size = group_size;
  a.fold = fold_div > 0 ? a.D / fold_div : 0;
  a.scale = (float)scale;
  a.dropout_p = (float)dropout_p;
  TORCH_CHECK_VALUE(dropout_p == 0 || seed.has_value(), "leap_attention: dropout needs a seed");
  if (seed.has_value()) a.seed = seed->item<int64_t>();
  a.query = video(query), a.key = video(key), a.value = video(value);
  return a;
}

constexpr int64_t CACHED_FLOATS = 1 << 16;  // what an item keeps in the second-level cache

// Panels of queries to an item: as many as share one load of the keys and still leave work for every thread.
int64_t panels_per_item(const LeapAttention& a, int64_t tile) {
  int64_t panels = (a.max_group() + tile - 1) / tile;
  int64_t most = std::max<int64_t>(1, CACHED_FLOATS / (2 * tile * a.D));  // for their queries and outputs
  int64_t groups = a.B * a.H * a.groups(), items = 1;
  while ((panels + items - 1) / items > most || (groups * items < 2 * at::get_num_threads() && items < panels)) ++items;
  return (panels + items - 1) / items;
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_,
                                           int64_t leap, int64_t group_size, int64_t fold_div, double dropout_p,
                                           const std::optional<at::Tensor>& seed, double scale) {
  at::Tensor query = with_rows(query_), key = with_rows(key_), value = with_rows(value_);
  LeapAttention a = arguments(query, key, value, leap, group_size, fold_div, dropout_p, seed, scale);
  at::Tensor out = empty_rows(query), lse = at::empty(query.sizes().slice(0, 4), query.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, lse};
  const Kernels& k = kernels();
  a.out = video(out);
  a.lse = lse.data_ptr<float>();
  a.panels = panels_per_item(a, k.tile);
  int64_t tiles = (a.max_group() + a.panels * k.tile - 1) / (a.panels * k.tile);
  run(k.leap_forward, a, a.B * a.H * a.groups() * tiles, k.forward_workspace(a.D, a.panels));
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
  const Kernels& k = kernels();
  at::Tensor delta = at::empty_like(lse);
  if (grad_lse.has_value())
    at::neg_out(delta, *grad_lse);
  else
    delta.zero_();
  a.out = video(out);
  a.lse = lse.data_ptr<float>();
  a.delta = delta.data_ptr<float>();
  a.grad_out = video(grad_out);
  a.grad_query = video(grad_query), a.grad_key = video(grad_key), a.grad_value = video(grad_value);

  // A thread takes whole groups while what it keeps of one stays in cache and there are groups enough: five products
  // instead of seven. Otherwise queries and keys are cut separately.
  int64_t groups = a.B * a.H * a.groups(), rows = a.max_group();
  a.chunk = std::max(k.tile, CACHED_FLOATS / a.D / k.tile * k.tile);
  run(k.leap_delta, a, groups, k.forward_workspace(a.D, 1));
  if ((rows <= a.chunk || rows * a.D <= 4 * CACHED_FLOATS) && groups >= at::get_num_threads()) {
    run(k.leap_backward, a, groups, k.backward_workspace(a.D, a.chunk, rows, rows));
  } else {
    a.chunk = std::min(a.chunk, 4 * k.tile);
    run(k.leap_backward_query, a, groups * ((rows + a.chunk - 1) / a.chunk), k.backward_workspace(a.D, a.chunk, a.chunk, 0));
    run(k.leap_backward_key, a, groups * ((rows + k.tile - 1) / k.tile), k.backward_workspace(a.D, a.chunk, rows, k.tile));
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("leap_attention", forward);
  m.impl("leap_attention_backward", backward);
}

}  // namespace vattn
