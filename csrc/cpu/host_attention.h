// What every attention operator does on the CPU: a call of it, forward, backward and tangent. An operator adds its own
// checks and settings, and says where it does something else.
#pragma once

#include <cmath>

#include "host.h"

namespace vattn {

// Panels of queries to an item: as many as share one load of the keys and still leave work for every thread. For each
// query `rows` rows are kept: the forward has that of the query and that of its output, or none if it takes all keys at
// once.
inline int64_t panels_of_item(const Attention& a, int64_t rows) {
  constexpr int64_t WORTH_A_LOAD = 32;
  const int64_t tile = kernels().tile, panels = parts(a.max_queries, tile);
  int64_t items = 1, most = rows == 0 ? WORTH_A_LOAD : std::max<int64_t>(1, CACHED_FLOATS / (rows * tile * a.D));
  while (parts(panels, items) > most || (a.components * items < 2 * num_threads() && items < panels)) ++items;
  return parts(panels, items);
}

inline int64_t panels_of_forward(const Attention& a) {
  return panels_of_item(a, a.max_keys <= kernels().forward_chunk(a.D) ? 0 : 2);
}

template <class Args>
void run_forward(const AttentionKernels<Args>& kernel, const Args& a) {
  const Kernels& k = kernels();
  run(kernel.forward, a, a.components * parts(a.max_queries, a.panels * k.tile), k.forward_workspace(a.D, a.panels, a.max_keys));
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
    run(kernel.delta, a, a.components * parts(a.max_queries, k.tile), k.forward_workspace(a.D, 1, 0));
    a.chunk = std::min(a.chunk, 4 * k.tile);
    run(kernel.backward_query, a, a.components * parts(a.max_queries, a.chunk),
        k.backward_workspace(a.D, a.chunk, a.chunk, 0));
    run(kernel.backward_key, a, a.components * parts(a.max_keys, k.tile),
        k.backward_workspace(a.D, a.chunk, a.max_queries, k.tile));
  }
}

// What every attention takes, of a query (B, H, tokens, D) with `axes` axes, which it returns as the kernels read it.
inline Tensor set_attention(const char* op, Attention& a, const Tensor& query_, int64_t axes, double scale) {
  a.dtype = dtype_of(op, "query", query_);
  Tensor query = with_rows(query_);
  check_value(query.dim() == axes, op, ": query must have ", axes, " axes, got query.shape=", query.sizes());
  a.B = query.size(0), a.H = query.size(1), a.D = query.size(-1);
  check_value(a.D >= 1 && a.D <= 256, op, ": head_dim must be between 1 and 256, got head_dim=", a.D);
  checked_product(op, "query.shape", query.sizes());
  check_value(std::isfinite(scale), op, ": scale must be finite, got scale=", scale);
  a.scale = (float)scale;
  a.query = strided(query);
  return query;
}

// The start of delta: minus the gradient of lse, or 0.
inline Tensor start_delta(const Tensor& lse, const MaybeTensor& grad_lse) {
  if (!grad_lse.has_value()) return zeros(lse.sizes());
  Tensor delta = empty(lse.sizes(), ScalarType::Float);
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

// Argument `name`, which belongs to `primal`, as the kernels read it.
inline Tensor rows_like(const char* op, Name name, const Tensor& x, const Tensor& primal) {
  check_tensor(op, name, x, primal.sizes(), primal.scalar_type());
  return with_rows(x);
}
inline Tensors rows_like(const char* op, Name name, const Tensors& list, const Tensors& primals) {
  check_value(list.size() == primals.size(), op, ": ", name, " must have ", primals.size(), " elements, got ",
              list.size());
  Tensors results;
  for (size_t i = 0; i < list.size(); ++i)
    results.push_back(rows_like(op, {name.name, (int64_t)i}, list[i], primals[i]));
  return results;
}

// Which keys there are: those of the tokens of the query, or of any number of other tokens.
enum class Tokens { OfQuery, Others };

// One call of an attention operator: the arguments of its kernels, and the tensors that they point to. Keys is Tensor,
// or Tensors where keys and values come in lists.
template <class Args, class Keys = Tensor>
class AttentionCall {
  static constexpr bool LISTS = std::is_same_v<Keys, Tensors>;
  std::vector<std::vector<Strided>> lists;  // that `a` points to
  Tensor seed;                              // and the numbers behind it, likewise

 protected:
  const char* op;
  const AttentionKernels<Args>& kernel;
  Args a{};
  Tensor query;
  Keys key, value;
  bool leaves_keys = false;  // whether there may be keys that no query reads

  AttentionCall(const char* op, const AttentionKernels<Args>& kernel, int64_t axes, Tokens tokens,
                const Tensor& query_, const Keys& key_, const Keys& value_, double dropout_p,
                const MaybeTensor& seed, double scale)
      : op(op), kernel(kernel), query(set_attention(op, a, query_, axes, scale)),
        key(checked_keys("key", key_, tokens)), value(rows_like(op, LISTS ? "values" : "value", value_, key)) {
    a.key = view(key), a.value = view(value);
    set_dropout(dropout_p, seed);
  }
  AttentionCall(const AttentionCall&) = delete;  // `a` points into this object

  Strided view(const Tensor& x) { return strided(x); }
  const Strided* view(const Tensors& list) {
    std::vector<Strided>& views = lists.emplace_back();
    for (const Tensor& x : list) views.push_back(strided(x));
    return views.data();
  }

  Tensor checked_keys(Name name, const Tensor& x, Tokens tokens) const {
    if (tokens == Tokens::OfQuery) return rows_like(op, name, x, query);
    check_tensor(op, name, x, {a.B, a.H, ANY, a.D}, query.scalar_type());
    checked_product(op, name, x.sizes());
    return with_rows(x);
  }
  Tensors checked_keys(Name, const Tensors& list, Tokens tokens) const {
    check_value(!list.empty(), op, ": keys must have at least one element, got none");
    Tensors keys;
    for (const Tensor& x : list) keys.push_back(checked_keys({"keys", (int64_t)keys.size()}, x, tokens));
    return keys;
  }

  // How many tokens a tensor (B, H, tokens, D) has.
  static int64_t tokens_of(const Tensor& x) {
    int64_t tokens = 1;
    for (int64_t size : x.sizes().slice(2, x.dim() - 3)) tokens *= size;
    return tokens;
  }
  // Behind the seed may be the numbers of batches and heads, of query tokens and of key tokens.
  void set_dropout(double dropout_p, const MaybeTensor& seed_) {
    check_value(0 <= dropout_p && dropout_p <= 1, op, ": dropout_p must be between 0 and 1, got dropout_p=", dropout_p);
    check_value(dropout_p == 0 || seed_.has_value(), op, ": dropout needs a seed, got seed=None");
    a.dropout_p = (float)dropout_p;
    if (!seed_.has_value()) return;
    const int64_t heads = a.B * a.H, queries = tokens_of(query);
    int64_t keys = 0;
    for_each(key, [&](const Tensor& x) { keys += tokens_of(x); });
    check_tensor(op, "seed", *seed_, {ANY}, ScalarType::Long);
    check_value(seed_->size(0) == 1 || seed_->size(0) == 1 + heads + queries + keys, op,
                ": seed must have 1 element, or 1 + ", heads, " + ", queries, " + ", keys,
                " with the numbers of heads, queries and keys, got seed.shape=", seed_->sizes());
    seed = contiguous(*seed_, ScalarType::Long);
    const int64_t* first = seed.const_data_ptr<int64_t>();
    a.seed = *first++;
    if (seed.size(0) > 1) a.numbers = {first, first + heads, first + heads + queries};
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
      a.panels = panels_of_forward(a);
      run_forward(out, lse);
    }
    return {out, lse};
  }

  std::tuple<Tensor, Keys, Keys> backward(const Tensor& grad_out_, const MaybeTensor& grad_lse, const Tensor& out_,
                                          const Tensor& lse_) {
    Tensor grad_out = rows_like(op, "grad_out", grad_out_, query), out = rows_like(op, "out", out_, query);
    const Sizes numbers = query.sizes().slice(0, query.dim() - 1);
    check_tensor(op, "lse", lse_, numbers, ScalarType::Float);
    if (grad_lse.has_value()) check_tensor(op, "grad_lse", *grad_lse, numbers, ScalarType::Float);
    Tensor lse = contiguous(lse_, ScalarType::Float);
    Tensor grad_query = empty_rows(query);
    Keys grad_key = each(key, empty_rows), grad_value = each(value, empty_rows);
    auto zero = [](Tensor x) { torch::stable::zero_(x); };
    if (leaves_keys || query.numel() == 0) for_each(grad_key, zero), for_each(grad_value, zero);
    if (query.numel() == 0) return {grad_query, grad_key, grad_value};
    Tensor delta = start_delta(lse, grad_lse);
    a.out = strided(out), a.grad_out = strided(grad_out), a.grad_query = strided(grad_query);
    a.lse = floats(lse), a.delta = floats(delta);
    run_backward(grad_key, grad_value);
    return {grad_query, grad_key, grad_value};
  }

  std::tuple<Tensor, Tensor> tangent(const Tensor& query_tangent_, const Keys& key_tangent_,
                                     const Keys& value_tangent_, const Tensor& out_, const Tensor& lse_) {
    Tensor query_tangent = rows_like(op, "query_tangent", query_tangent_, query);
    Keys key_tangent = rows_like(op, LISTS ? "key_tangents" : "key_tangent", key_tangent_, key);
    Keys value_tangent = rows_like(op, LISTS ? "value_tangents" : "value_tangent", value_tangent_, value);
    Tensor out = rows_like(op, "out", out_, query);
    Tensor out_tangent = empty_rows(query), lse_tangent = empty_numbers(query);
    check_tensor(op, "lse", lse_, lse_tangent.sizes(), ScalarType::Float);
    Tensor lse = contiguous(lse_, ScalarType::Float);
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
