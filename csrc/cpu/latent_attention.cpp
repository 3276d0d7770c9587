// vattn::latent_attention, its backward and its tangent on the CPU.
#include "host_attention.h"

namespace vattn {
namespace {

struct LatentCall : AttentionCall<LatentAttention, Tensors> {
  Tensor lengths;
  std::vector<int64_t> ends;

  LatentCall(const Tensor& query, const Tensors& keys, const Tensors& values, const MaybeTensor& key_lengths,
             double dropout_p, const MaybeTensor& seed, double scale)
      : AttentionCall("latent_attention", kernels().latent_attention, 4, Tokens::Others, query, keys, values,
                      dropout_p, seed, scale) {
    for (const Tensor& x : key) ends.push_back(a.max_keys += x.size(2));
    if (key_lengths.has_value()) {
      lengths = checked_key_lengths(op, *key_lengths, a.B, a.max_keys);
      a.key_lengths = lengths.const_data_ptr<int64_t>();
      leaves_keys = true;
    }
    a.Lq = a.max_queries = query.size(2);
    a.segment_ends = ends.data();
    a.components = a.B * a.H;
    a.splits = 1;
  }

  // Where there are too few queries for the threads, each range of keys is an item of its own, and results are put
  // together in the end. Calls f(outs, lses) if so.
  template <class F>
  bool split_keys(F f) {
    constexpr int64_t KEYS_WORTH_A_SPLIT = 1024;
    const int64_t items = a.components * parts(a.max_queries, a.panels * kernels().tile), threads = num_threads();
    if (items >= threads) return false;
    a.splits = std::clamp<int64_t>(a.max_keys / KEYS_WORTH_A_SPLIT, 1, parts(2 * threads, items));
    if (a.splits == 1) return false;
    a.components *= a.splits;
    Tensor outs = empty({a.splits, a.B, a.H, a.Lq, a.D}, ScalarType::Float);
    Tensor lses = empty({a.splits, a.B, a.H, a.Lq}, ScalarType::Float);
    a.split_out = outs.stride(0), a.split_lse = lses.stride(0);
    f(outs, lses);
    return true;
  }

  void run_forward(Tensor& out, Tensor& lse) override {
    bool split = split_keys([&](const Tensor& outs, const Tensor& lses) {
      Tensors out_parts, lse_parts;
      for (int64_t i = 0; i < a.splits; ++i) {
        out_parts.push_back(torch::stable::select(outs, 0, i));
        lse_parts.push_back(torch::stable::select(lses, 0, i));
      }
      AttentionCall::run_forward(out_parts[0], lse_parts[0]);
      auto [merged, merged_lse] = merge_attention(out_parts, lse_parts);
      torch::stable::copy_(out, merged);
      lse = merged_lse;
    });
    if (!split) AttentionCall::run_forward(out, lse);
  }

  void run_tangent(Tensor& out_tangent, Tensor& lse_tangent) override {
    const std::vector<int64_t> first_axis = {0};
    bool split = split_keys([&](const Tensor& outs, const Tensor& lses) {
      Tensor first_out = torch::stable::select(outs, 0, 0), first_lse = torch::stable::select(lses, 0, 0);
      AttentionCall::run_tangent(first_out, first_lse);
      torch::stable::copy_(out_tangent, torch::stable::sum(outs, first_axis));
      lse_tangent = torch::stable::sum(lses, first_axis);
    });
    if (!split) AttentionCall::run_tangent(out_tangent, lse_tangent);
  }
};

using Latent = AttentionOperator<LatentCall, Tensors, const MaybeTensor&, double, const MaybeTensor&, double>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) { VATTN_ATTENTION(m, "latent_attention", Latent); }

}  // namespace vattn
