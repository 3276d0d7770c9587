// vattn::node_sparse_attention, its backward and its tangent on the CPU.
#include "host_attention.h"

namespace vattn {
namespace {

struct NodeSparseCall : AttentionCall<NodeSparseAttention> {
  Tensor kept, lengths;
  int64_t Lk;

  NodeSparseCall(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& kept_,
                 const MaybeTensor& kept_lengths, double dropout_p, const MaybeTensor& seed, double scale)
      : AttentionCall("node_sparse_attention", kernels().node_sparse_attention, 4, Tokens::Others, query, key, value,
                      dropout_p, seed, scale) {
    check_tensor(op, "kept", kept_, {a.B, ANY}, ScalarType::Long);
    kept = contiguous(kept_, ScalarType::Long);
    const int64_t K = kept.size(1), *index = kept.const_data_ptr<int64_t>();
    Lk = key.size(2);
    a.max_keys = K;
    if (kept_lengths.has_value()) {
      lengths = checked_lengths(op, "kept_lengths", *kept_lengths, a.B, "the number of entries of kept", K);
      a.kept_lengths = lengths.const_data_ptr<int64_t>();
    }
    std::vector<int64_t> seen(Lk, -1);  // the last sample that keeps a key
    for (int64_t i = 0; i < kept.numel(); ++i) {
      if (i % K >= a.length(i / K)) continue;
      check_value(0 <= index[i] && index[i] < Lk, op, ": kept must be from 0 to below the number of keys (", Lk,
                  "), got kept[", i / K, ", ", i % K, "]=", index[i]);
      a.compact |= seen[index[i]] == i / K;  // what is stored twice must add up
      seen[index[i]] = i / K;
    }
    a.kept = index;
    a.Lq = a.max_queries = query.size(2);
    a.components = a.B * a.H;
    leaves_keys = true;
  }

  void run_backward(Tensor& grad_key, Tensor& grad_value) override {
    if (!a.compact) return AttentionCall::run_backward(grad_key, grad_value);
    Tensor keys = empty({a.B, a.H, a.max_keys, a.D}, ScalarType::Float);
    Tensor values = empty(keys.sizes(), ScalarType::Float);
    AttentionCall::run_backward(keys, values);
    add_up(grad_key, keys), add_up(grad_value, values);
  }

  // The gradients of keys, from those of kept keys.
  void add_up(Tensor& grad, const Tensor& of_kept) const {
    Tensor sums = zeros(grad.sizes());
    float *to = floats(sums), *from = floats(of_kept);
    torch::stable::parallel_for(0, a.B * a.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * a.max_keys; i < end * a.max_keys; ++i) {
        int64_t bh = i / a.max_keys, at = i % a.max_keys;
        if (at >= a.length(bh / a.H)) continue;
        int64_t row = bh * Lk + a.kept[bh / a.H * a.max_keys + at];
        for (int64_t d = 0; d < a.D; ++d) to[row * a.D + d] += from[i * a.D + d];
      }
    });
    torch::stable::copy_(grad, sums);
  }
};

using NodeSparse = AttentionOperator<NodeSparseCall, Tensor, const Tensor&, const MaybeTensor&, double,
                                     const MaybeTensor&, double>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) { VATTN_ATTENTION(m, "node_sparse_attention", NodeSparse); }

}  // namespace vattn
