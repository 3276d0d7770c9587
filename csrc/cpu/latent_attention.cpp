// vattn::latent_attention, its backward and its tangent on the CPU.
#include <torch/library.h>

#include <vector>

#include "host.h"

namespace vattn {
namespace {

constexpr const char* OP = "latent_attention";

// The arguments of the kernels, and what they point to.
struct Call {
  LatentAttention a{};
  at::Tensor query, lengths;
  std::vector<at::Tensor> keys, values;
  std::vector<Segment> segments;

  Call(const at::Tensor& query_, at::TensorList keys_, at::TensorList values_,
       const std::optional<at::Tensor>& key_lengths, double dropout_p, const std::optional<at::Tensor>& seed,
       double scale)
      : query(with_rows(query_)) {
    set_attention(OP, a, query, dropout_p, seed, scale);
    TORCH_CHECK_VALUE(keys_.size() == values_.size() && !keys_.empty(),
                      OP, ": keys and values must be as many, and at least one");
    for (size_t i = 0; i < keys_.size(); ++i) {
      const at::Tensor &key = keys.emplace_back(with_rows(keys_[i])), &value = values.emplace_back(with_rows(values_[i]));
      TORCH_CHECK_VALUE(key.sizes() == value.sizes() && key.dim() == 4 && key.size(0) == a.B && key.size(1) == a.H &&
                            key.size(3) == a.D && key.scalar_type() == query.scalar_type() &&
                            value.scalar_type() == query.scalar_type(),
                        OP, ": keys and values must fit the query in all but their length");
      segments.push_back({a.max_keys, key.size(2), video(key), video(value), {}, {}, {}, {}});
      a.max_keys += key.size(2);
    }
    if (key_lengths.has_value()) {
      lengths = key_lengths->to(at::kLong).contiguous();
      const int64_t* length = lengths.data_ptr<int64_t>();
      for (int64_t b = 0; b < a.B; ++b)
        TORCH_CHECK_VALUE(0 <= length[b] && length[b] <= a.max_keys,
                          OP, ": key_lengths must be between 0 and the number of keys (", a.max_keys,
                          "), got key_lengths[", b, "]=", length[b]);
      a.key_lengths = length;
    }
    a.Lq = a.max_queries = query.size(2);
    a.segments = segments.data();
    a.components = a.B * a.H;
    a.query = video(query);
    a.splits = 1;
  }

  // Where there are too few queries for the threads, each range of keys is an item of its own, and results are put
  // together in the end. Panels are known.
  void split_keys() {
    constexpr int64_t KEYS_WORTH_A_SPLIT = 1024;
    int64_t items = a.components * parts(a.max_queries, a.panels * kernels().tile), threads = at::get_num_threads();
    if (items < threads) a.splits = std::clamp<int64_t>(a.max_keys / KEYS_WORTH_A_SPLIT, 1, parts(2 * threads, items));
    a.components *= a.splits;
  }
};

// The results of all splits, and how they lie.
struct Splits {
  at::Tensor outs, lses;
  explicit Splits(LatentAttention& a)
      : outs(at::empty({a.splits, a.B, a.H, a.Lq, a.D}, at::kFloat)),
        lses(at::empty({a.splits, a.B, a.H, a.Lq}, at::kFloat)) {
    a.split_out = outs.stride(0), a.split_lse = lses.stride(0);
  }
};

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, at::TensorList keys, at::TensorList values,
                                           const std::optional<at::Tensor>& key_lengths, double dropout_p,
                                           const std::optional<at::Tensor>& seed, double scale) {
  Call call(query, keys, values, key_lengths, dropout_p, seed, scale);
  LatentAttention& a = call.a;
  at::Tensor out = empty_rows(call.query), lse = empty_sums(call.query);
  if (out.numel() == 0) return {out, lse};
  const Kernels& k = kernels();
  a.panels = panels_of_item(a, k.tile);
  call.split_keys();
  if (a.splits == 1) {
    a.out = video(out);
    a.lse = lse.data_ptr<float>();
    run_forward(k.latent_attention, a);
    return {out, lse};
  }
  Splits splits(a);
  a.out = video(splits.outs[0]);
  a.lse = splits.lses.data_ptr<float>();
  run_forward(k.latent_attention, a);
  auto [merged, merged_lse] = merge_attention(splits.outs.unbind(), splits.lses.unbind());
  return {out.copy_(merged), merged_lse};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>> backward(
    const at::Tensor& grad_out_, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    at::TensorList keys, at::TensorList values, const at::Tensor& out_, const at::Tensor& lse_,
    const std::optional<at::Tensor>& key_lengths, double dropout_p, const std::optional<at::Tensor>& seed,
    double scale) {
  Call call(query, keys, values, key_lengths, dropout_p, seed, scale);
  LatentAttention& a = call.a;
  at::Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = lse_.contiguous();
  at::Tensor grad_query = empty_rows(call.query);
  std::vector<at::Tensor> grad_keys, grad_values;
  for (size_t i = 0; i < call.segments.size(); ++i) {
    Segment& segment = call.segments[i];
    segment.grad_key = video(grad_keys.emplace_back(empty_rows(call.keys[i])));
    segment.grad_value = video(grad_values.emplace_back(empty_rows(call.values[i])));
    if (key_lengths.has_value()) grad_keys[i].zero_(), grad_values[i].zero_();  // what no sample reads
  }
  at::Tensor delta = start_delta(lse, grad_lse);
  a.out = video(out), a.grad_out = video(grad_out), a.grad_query = video(grad_query);
  a.lse = lse.data_ptr<float>(), a.delta = delta.data_ptr<float>();
  run_backward(kernels().latent_attention, a);
  return {grad_query, grad_keys, grad_values};
}

std::tuple<at::Tensor, at::Tensor> tangent(const at::Tensor& query_tangent, at::TensorList key_tangents,
                                           at::TensorList value_tangents, const at::Tensor& query, at::TensorList keys,
                                           at::TensorList values, const at::Tensor& out, const at::Tensor& lse,
                                           const std::optional<at::Tensor>& key_lengths, double dropout_p,
                                           const std::optional<at::Tensor>& seed, double scale) {
  Call call(query, keys, values, key_lengths, dropout_p, seed, scale);
  LatentAttention& a = call.a;
  QueryTangents of(OP, a, query_tangent, call.query, out, lse);
  TORCH_CHECK_VALUE(key_tangents.size() == keys.size() && value_tangents.size() == keys.size(), OP,
                    ": key_tangents and value_tangents must be as many as keys (", keys.size(), "), got ",
                    key_tangents.size(), " and ", value_tangents.size());
  std::vector<at::Tensor> tangents;
  auto tangent_of = [&](const std::string& name, const at::Tensor& x, const std::string& primal_name,
                        const at::Tensor& primal) {
    return video(tangents.emplace_back(tangent_rows(OP, name, x, primal_name, primal)));
  };
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    Segment& segment = call.segments[i];
    segment.key_tangent = tangent_of("key_tangents" + index, key_tangents[i], "keys" + index, call.keys[i]);
    segment.value_tangent = tangent_of("value_tangents" + index, value_tangents[i], "values" + index, call.values[i]);
  }
  if (query.numel() == 0) return {of.out_tangent, of.lse_tangent};
  const Kernels& k = kernels();
  a.query_tangent = video(of.query), a.out = video(of.out), a.out_tangent = video(of.out_tangent);
  a.panels = panels_of_tangent(a, k.tile);
  call.split_keys();
  if (a.splits == 1) {
    run_tangent(k.latent_attention, a);
    return {of.out_tangent, of.lse_tangent};
  }
  Splits splits(a);
  a.out_tangent = video(splits.outs[0]), a.lse_tangent = splits.lses.data_ptr<float>();
  run_tangent(k.latent_attention, a);
  return {of.out_tangent.copy_(splits.outs.sum(0)), splits.lses.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("latent_attention", forward);
  m.impl("latent_attention_backward", backward);
  m.impl("latent_attention_jvp", tangent);
}

}  // namespace vattn
