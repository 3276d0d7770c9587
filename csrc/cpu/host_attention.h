// What every attention operator does on the CPU: a call of it, forward, backward and tangent. An operator adds its own
// checks and settings, and says where it does something else.
#pragma once

#include "host.h"

namespace vattn {

// Panels of queries to an item: as many as share one load of the keys and still leave work for every thread. For each
// query `rows` rows are kept: the forward has that of the query and that of its output.
inline int64_t panels_of_item(const Attention& a, int64_t rows = 2) {
  const int64_t tile = kernels().tile, panels = parts(a.max_queries, tile);
  int64_t items = 1, most = std::max<int64_t>(1, CACHED_FLOATS / (rows * tile * a.D));
  while (parts(panels, items) > most || (a.components * items < 2 * num_threads() && items < panels)) ++items;
  return parts(panels, items);
}

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

// A thread takes whole components while what it keeps of one stays in cache and there are enough of them: five products
// instead of seven, and delta on the way. Otherwise queries and keys are cut separately.
template <class Args>
void run_backward(const AttentionKernels<Args>& kernel, Args& a) {
  const Kernels& k = kernels();
  a.chunk = std::max(k.tile, CACHED_FLOATS / a.D / k.tile * k.tile);
  bool keeps_little = a.max_queries <= a.chunk || a.max_keys * a.D <= 4 * CACHED_FLOATS;
  if (keeps_little && a.components >= num_threads()) {
    run(kernel.backward, a, a.components, k.backward_workspace(a.D, a.chunk, a.max_queries, a.max_keys));
  } else {
    run(kernel.delta, a, a.components * parts(a.max_queries, k.tile), k.forward_workspace(a.D, 1));
    a.chunk = std::min(a.chunk, 4 * k.tile);
    run(kernel.backward_query, a, a.components * parts(a.max_queries, a.chunk),
        k.backward_workspace(a.D, a.chunk, a.chunk, 0));
    run(kernel.backward_key, a, a.components * parts(a.max_keys, k.tile),
        k.backward_workspace(a.D, a.chunk, a.max_queries, k.tile));
  }
}

// What every attention takes, of a query (B, H, tokens, D) with `axes` axes.
inline void set_attention(const char* op, Attention& a, const Tensor& query, int64_t axes, double dropout_p,
                          const MaybeTensor& seed, double scale) {
  check_value(query.dim() == axes, op, ": query must have ", axes, " axes, got query.shape=", query.sizes());
  a.dtype = dtype_of(op, query);
  a.B = query.size(0), a.H = query.size(1), a.D = query.size(-1);
  check_value(a.D >= 1 && a.D <= 256, op, ": head_dim must be between 1 and 256, got head_dim=", a.D);
  check_value(dropout_p == 0 || seed.has_value(), op, ": dropout needs a seed, got seed=None");
  a.scale = (float)scale;
  a.dropout_p = (float)dropout_p;
  if (seed.has_value()) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_int64(seed->get(), &a.seed));
  a.query = strided(query);
}

// The start of delta: minus the gradient of lse, or 0.
inline Tensor start_delta(const char* op, const Tensor& lse, const MaybeTensor& grad_lse) {
  Tensor delta = empty(lse.sizes(), ScalarType::Float);
  if (!grad_lse.has_value()) return torch::stable::zero_(delta);
  check_value(grad_lse->sizes().equals(lse.sizes()), op, ": grad_lse must have the shape of lse (", lse.sizes(),
              "), got grad_lse.shape=", grad_lse->sizes());
  Tensor grad = contiguous(*grad_lse, ScalarType::Float);
  std::transform(floats(grad), floats(grad) + grad.numel(), floats(delta), [](float x) { return -x; });
  return delta;
}

// Each of the keys of an operator: one tensor, or a list of them.
template <class F>
Tensor each(const Tensor& x, F f) { return f(x); }
template <class F>
Tensors each(const Tensors& list, F f) {
  Tensors results;
  for (const Tensor& x : list) results.push_back(f(x));
  return results;
}
template <class F>
void for_each(const Tensor& x, F f) { f(x); }
template <class F>
void for_each(const Tensors& list, F f) {
  for (const Tensor& x : list) f(x);
}

// The tangents `name` of the arguments `of`, as the kernels read them.
inline Tensor tangent_rows(const char* op, const std::string& name, const Tensor& x, const std::string& of,
                           const Tensor& primal) {
  check_like(op, name, x, of, primal.sizes(), primal.scalar_type());
  return with_rows(x);
}
inline Tensors tangent_rows(const char* op, const std::string& name, const Tensors& x, const std::string& of,
                            const Tensors& primals) {
  Tensors results;
  for (size_t i = 0; i < primals.size(); ++i) {
    const std::string index = "s[" + std::to_string(i) + "]";
    results.push_back(tangent_rows(op, name + index, x[i], of + index, primals[i]));
  }
  return results;
}

// One call of an attention operator: the arguments of its kernels, and the tensors that they point to. Keys is Tensor,
// or Tensors where keys and values come in lists.
template <class Args, class Keys = Tensor>
class AttentionCall {
  std::vector<std::vector<Strided>> lists;  // that `a` points to

 protected:
  const char* op;
  const AttentionKernels<Args>& kernel;
  Args a{};
  Tensor query;
  Keys key, value;
  bool leaves_keys = false;  // whether there may be keys that no query reads

  AttentionCall(const char* op, const AttentionKernels<Args>& kernel, int64_t axes, const Tensor& query_,
                const Keys& key_, const Keys& value_, double dropout_p, const MaybeTensor& seed, double scale)
      : op(op), kernel(kernel), query(with_rows(query_)), key(each(key_, with_rows)), value(each(value_, with_rows)) {
    set_attention(op, a, query, axes, dropout_p, seed, scale);
    auto check = [&](const Tensor& x) {
      check_value(x.dim() == axes, op, ": keys and values must have ", axes, " axes, got ", x.sizes());
    };
    for_each(key, check), for_each(value, check);
    a.key = view(key), a.value = view(value);
  }
  AttentionCall(const AttentionCall&) = delete;  // `a` points into this object

  Strided view(const Tensor& x) { return strided(x); }
  const Strided* view(const Tensors& list) {
    std::vector<Strided>& views = lists.emplace_back();
    for (const Tensor& x : list) views.push_back(strided(x));
    return views.data();
  }

  void check_one_shape() const {
    for (const Tensor* x : {&key, &value})
      check_value(x->sizes().equals(query.sizes()) && x->scalar_type() == query.scalar_type(), op,
                  ": query, key and value must have one shape and dtype");
  }
  void check_one_shape_but_tokens(const Tensor& key, const Tensor& value, const char* names) const {
    check_value(key.dim() == 4 && key.size(0) == a.B && key.size(1) == a.H && key.size(3) == a.D &&
                    key.scalar_type() == query.scalar_type() && value.sizes().equals(key.sizes()) &&
                    value.scalar_type() == query.scalar_type(),
                op, ": ", names, " must fit the query in all but their length");
  }

  // All is set but where the results go.
  virtual void run_forward(Tensor& out, Tensor& lse) {
    a.out = strided(out), a.lse = floats(lse);
    vattn::run_forward(kernel, a);
  }
  virtual void run_tangent(Tensor& out_tangent, Tensor& lse_tangent) {
    a.out_tangent = strided(out_tangent), a.lse_tangent = floats(lse_tangent);
    vattn::run_tangent(kernel, a);
  }
  virtual void run_backward(Keys& grad_key, Keys& grad_value) {
    a.grad_key = view(grad_key), a.grad_value = view(grad_value);
    vattn::run_backward(kernel, a);
  }

 public:
  virtual ~AttentionCall() = default;

  std::tuple<Tensor, Tensor> forward() {
    Tensor out = empty_rows(query), lse = empty_numbers(query);
    if (out.numel() > 0) {
      a.panels = panels_of_item(a);
      run_forward(out, lse);
    }
    return {out, lse};
  }

  std::tuple<Tensor, Keys, Keys> backward(const Tensor& grad_out_, const MaybeTensor& grad_lse, const Tensor& out_,
                                          const Tensor& lse_) {
    Tensor grad_out = tangent_rows(op, "grad_out", grad_out_, "query", query);
    Tensor out = tangent_rows(op, "out", out_, "query", query), lse = contiguous(lse_, ScalarType::Float);
    Tensor grad_query = empty_rows(query);
    Keys grad_key = each(key, empty_rows), grad_value = each(value, empty_rows);
    auto zero = [](Tensor x) { torch::stable::zero_(x); };
    if (leaves_keys || query.numel() == 0) for_each(grad_key, zero), for_each(grad_value, zero);
    if (query.numel() == 0) return {grad_query, grad_key, grad_value};
    Tensor delta = start_delta(op, lse, grad_lse);
    a.out = strided(out), a.grad_out = strided(grad_out), a.grad_query = strided(grad_query);
    a.lse = floats(lse), a.delta = floats(delta);
    run_backward(grad_key, grad_value);
    return {grad_query, grad_key, grad_value};
  }

  std::tuple<Tensor, Tensor> tangent(const Tensor& query_tangent_, const Keys& key_tangent_,
                                     const Keys& value_tangent_, const Tensor& out_, const Tensor& lse_) {
    Tensor query_tangent = tangent_rows(op, "query_tangent", query_tangent_, "query", query);
    Tensor out = tangent_rows(op, "out", out_, "query", query);
    Tensor out_tangent = empty_rows(query), lse_tangent = empty_numbers(query);
    check_like(op, "lse", lse_, "query without its last axis", lse_tangent.sizes(), ScalarType::Float);
    Tensor lse = contiguous(lse_, ScalarType::Float);
    Keys key_tangent = tangent_rows(op, "key_tangent", key_tangent_, "key", key);
    Keys value_tangent = tangent_rows(op, "value_tangent", value_tangent_, "value", value);
    if (query.numel() > 0) {
      a.query_tangent = strided(query_tangent), a.out = strided(out), a.lse = floats(lse);
      a.key_tangent = view(key_tangent), a.value_tangent = view(value_tangent);
      a.panels = panels_of_item(a, 3);  // the tangent of the query besides
      run_tangent(out_tangent, lse_tangent);
    }
    return {out_tangent, lse_tangent};
  }
};

// The functions of an operator, for the dispatcher: its settings come after its tensors.
template <class Call, class Keys, class... Settings>
struct AttentionOperator {
  static auto forward(const Tensor& query, const Keys& key, const Keys& value, Settings... settings) {
    return Call(query, key, value, settings...).forward();
  }
  static auto backward(const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& query, const Keys& key,
                       const Keys& value, const Tensor& out, const Tensor& lse, Settings... settings) {
    return Call(query, key, value, settings...).backward(grad_out, grad_lse, out, lse);
  }
  static auto tangent(const Tensor& query_tangent, const Keys& key_tangent, const Keys& value_tangent,
                      const Tensor& query, const Keys& key, const Keys& value, const Tensor& out, const Tensor& lse,
                      Settings... settings) {
    return Call(query, key, value, settings...).tangent(query_tangent, key_tangent, value_tangent, out, lse);
  }
};

#define VATTN_ATTENTION(m, name, Operator)                     \
  VATTN_OPERATOR(m, name, Operator::forward);                  \
  VATTN_OPERATOR(m, name "_backward", Operator::backward);     \
  VATTN_OPERATOR(m, name "_jvp", Operator::tangent)

}  // namespace vattn
