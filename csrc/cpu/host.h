// Between PyTorch's tensors and the kernels: what every operator's CPU side needs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "kernels.h"

namespace vattn {

inline Dtype dtype_of(const char* op, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::Float32;
    case at::kBFloat16: return Dtype::BFloat16;
    case at::kHalf: return Dtype::Float16;
    default:
      TORCH_CHECK_TYPE(false, op, ": the kernels take float32, bfloat16 and float16, got dtype=", x.scalar_type());
  }
}

// The kernels read rows whose last axis is contiguous; any other tensor is copied.
inline at::Tensor with_rows(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

inline Video video(const at::Tensor& x) {
  bool has_frames = x.dim() == 5;
  return {x.data_ptr(), x.stride(0), x.stride(1), has_frames ? x.stride(2) : 0, x.stride(-2)};
}

// An empty (B, H, ..., D) that lies in memory as (B, ..., H, D), so that merging heads is a view.
inline at::Tensor empty_rows(const at::Tensor& like) {
  return at::empty_like(like.movedim(1, -2), at::MemoryFormat::Contiguous).movedim(-2, 1);
}

// One number for each row of `like`.
inline at::Tensor empty_sums(const at::Tensor& like) {
  return at::empty(like.sizes().slice(0, like.dim() - 1), like.options().dtype(at::kFloat));
}

// What every attention takes, of a query (B, H, ..., D).
inline void set_attention(const char* op, Attention& a, const at::Tensor& query, double dropout_p,
                          const std::optional<at::Tensor>& seed, double scale) {
  a.dtype = dtype_of(op, query);
  a.B = query.size(0), a.H = query.size(1), a.D = query.size(-1);
  TORCH_CHECK_VALUE(a.D >= 1 && a.D <= 256, op, ": head_dim must be between 1 and 256, got head_dim=", a.D);
  TORCH_CHECK_VALUE(dropout_p == 0 || seed.has_value(), op, ": dropout needs a seed");
  a.scale = (float)scale;
  a.dropout_p = (float)dropout_p;
  if (seed.has_value()) a.seed = seed->item<int64_t>();
}

// Argument `name` must have the shape and the dtype of argument `of`, or those that it would have.
inline void check_like(const char* op, const std::string& name, const at::Tensor& x, const std::string& of,
                       at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.sizes() == sizes, op, ": ", name, " must have the shape of ", of, " (", sizes, "), got ", name,
                    ".shape=", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, op, ": ", name, " must have dtype ", dtype, ", got ", name,
                   ".dtype=", x.scalar_type());
}

// A tangent of argument `of`, as the kernels read it.
inline at::Tensor tangent_rows(const char* op, const std::string& name, const at::Tensor& tangent,
                               const std::string& of, const at::Tensor& primal) {
  check_like(op, name, tangent, of, primal.sizes(), primal.scalar_type());
  return with_rows(tangent);
}

// What the tangent of any attention reads and writes for each query, kept alive beside what the kernels take of it.
struct QueryTangents {
  at::Tensor query, out, lse, out_tangent, lse_tangent;  // query: its tangent

  // Of a primal whose rows are contiguous, and what the forward gave for it.
  QueryTangents(const char* op, Attention& a, const at::Tensor& tangent, const at::Tensor& primal,
                const at::Tensor& out_, const at::Tensor& lse_)
      : query(tangent_rows(op, "query_tangent", tangent, "query", primal)), out(with_rows(out_)),
        lse(lse_.contiguous()), out_tangent(empty_rows(primal)), lse_tangent(empty_sums(primal)) {
    check_like(op, "out", out, "query", primal.sizes(), primal.scalar_type());
    check_like(op, "lse", lse, "query without its last axis", lse_tangent.sizes(), at::kFloat);
    a.lse = lse.data_ptr<float>(), a.lse_tangent = lse_tangent.data_ptr<float>();
  }
};

// Runs items [0, items) on PyTorch's threads, each of which gets `floats` of workspace.
template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t items, int64_t floats) {
  if (items == 0) return;
  floats += 64;  // threads do not share cache lines
  at::Tensor workspace = at::empty({at::get_num_threads(), floats}, at::kFloat);
  float* base = workspace.data_ptr<float>();
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, base + at::get_thread_num() * floats);
  });
}

constexpr int64_t CACHED_FLOATS = 1 << 16;  // what an item keeps in the second-level cache

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Panels of queries to an item: as many as share one load of the keys and still leave work for every thread. For each
// query `rows` rows are kept: the forward has that of the query and that of its output.
inline int64_t panels_of_item(const Attention& a, int64_t tile, int64_t rows = 2) {
  int64_t panels = parts(a.max_queries, tile), items = 1;
  int64_t most = std::max<int64_t>(1, CACHED_FLOATS / (rows * tile * a.D));
  while (parts(panels, items) > most || (a.components * items < 2 * at::get_num_threads() && items < panels)) ++items;
  return parts(panels, items);
}

// The tangent has the tangent of the query besides.
inline int64_t panels_of_tangent(const Attention& a, int64_t tile) { return panels_of_item(a, tile, 3); }

template <class Args>
void run_forward(const AttentionKernels<Args>& kernel, const Args& a) {
  const Kernels& k = kernels();
  run(kernel.forward, a, a.components * parts(a.max_queries, a.panels * k.tile), k.forward_workspace(a.D, a.panels));
}

template <class Args>
void run_tangent(const AttentionKernels<Args>& kernel, const Args& a) {
  const Kernels& k = kernels();
  run(kernel.tangent, a, a.components * parts(a.max_queries, a.panels * k.tile), k.tangent_workspace(a.D, a.panels));
}

// The tangents of out and lse of an operator with one tensor of keys and one of values. `a` was made of the primals;
// `view` is what its kernels take of a tensor.
template <class Args, class View>
std::tuple<at::Tensor, at::Tensor> run_tangent(const char* op, const AttentionKernels<Args>& kernel, Args& a, View view,
                                               const at::Tensor& query_tangent, const at::Tensor& key_tangent_,
                                               const at::Tensor& value_tangent_, const at::Tensor& query,
                                               const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
                                               const at::Tensor& lse) {
  QueryTangents of(op, a, query_tangent, query, out, lse);
  at::Tensor key_tangent = tangent_rows(op, "key_tangent", key_tangent_, "key", key);
  at::Tensor value_tangent = tangent_rows(op, "value_tangent", value_tangent_, "value", value);
  if (query.numel() == 0) return {of.out_tangent, of.lse_tangent};
  a.query_tangent = view(of.query), a.key_tangent = view(key_tangent), a.value_tangent = view(value_tangent);
  a.out = view(of.out), a.out_tangent = view(of.out_tangent);
  a.panels = panels_of_tangent(a, kernels().tile);
  run_tangent(kernel, a);
  return {of.out_tangent, of.lse_tangent};
}

template <class Args>
void run_delta(const AttentionKernels<Args>& kernel, const Args& a) {
  const Kernels& k = kernels();
  run(kernel.delta, a, a.components * parts(a.max_queries, k.tile), k.forward_workspace(a.D, 1));
}

// A thread takes whole components while what it keeps of one stays in cache and there are enough of them: five products
// instead of seven, and delta on the way. Otherwise queries and keys are cut separately.
template <class Args>
void run_backward(const AttentionKernels<Args>& kernel, Args& a) {
  const Kernels& k = kernels();
  a.chunk = std::max(k.tile, CACHED_FLOATS / a.D / k.tile * k.tile);
  bool keeps_little = a.max_queries <= a.chunk || a.max_keys * a.D <= 4 * CACHED_FLOATS;
  if (keeps_little && a.components >= at::get_num_threads()) {
    run(kernel.backward, a, a.components, k.backward_workspace(a.D, a.chunk, a.max_queries, a.max_keys));
  } else {
    run_delta(kernel, a);
    a.chunk = std::min(a.chunk, 4 * k.tile);
    run(kernel.backward_query, a, a.components * parts(a.max_queries, a.chunk),
        k.backward_workspace(a.D, a.chunk, a.chunk, 0));
    run(kernel.backward_key, a, a.components * parts(a.max_keys, k.tile),
        k.backward_workspace(a.D, a.chunk, a.max_queries, k.tile));
  }
}

// Attention over a union of key sets from attention over its parts; an operator itself.
std::tuple<at::Tensor, at::Tensor> merge_attention(at::TensorList outs, at::TensorList lses);

// The start of delta: minus the gradient of lse, or 0.
inline at::Tensor start_delta(const at::Tensor& lse, const std::optional<at::Tensor>& grad_lse) {
  at::Tensor delta = at::empty(lse.sizes(), lse.options());
  return grad_lse.has_value() ? at::neg_out(delta, *grad_lse) : delta.zero_();
}

template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t rows) {
  constexpr int64_t ROWS_WORTH_A_THREAD = 256;
  at::parallel_for(0, rows, ROWS_WORTH_A_THREAD, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace vattn
