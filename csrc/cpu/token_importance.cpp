// vattn::token_importance on the CPU.
#include "host_attention.h"
#include "host_positions.h"

namespace vattn {
namespace {

Tensor token_importance(const Tensor& query_, const Tensor& key_, const MaybeTensor& bias_table,
                        const std::vector<int64_t>& window, int64_t num_global, const MaybeTensor& positions_,
                        const MaybeTensor& key_lengths, const MaybeTensor& lse_, double scale) {
  const char* op = "token_importance";
  TokenImportance a{};
  Tensor query = set_attention(op, a, query_, 4, scale), lengths, lse;
  check_tensor(op, "key", key_, {a.B, a.H, ANY, a.D}, query.scalar_type());
  Tensor key = with_rows(key_);
  a.Lq = a.max_queries = query.size(2), a.max_keys = key.size(2);
  check_value(!bias_table.has_value() || a.Lq == a.max_keys, op,
              ": with a bias_table query and key must be the same tokens, got ", a.Lq, " and ", a.max_keys);
  HostPositions positions(op, a.B, a.H, other_tokens(op, a.max_keys, num_global), num_global, bias_table, window,
                          positions_, /*is_causal=*/false);
  a.positions = positions.args;
  if (key_lengths.has_value()) {
    lengths = checked_key_lengths(op, *key_lengths, a.B, a.max_keys);
    a.key_lengths = lengths.const_data_ptr<int64_t>();
  }
  checked_product(op, "key.shape", key.sizes());
  if (lse_.has_value()) {
    check_tensor(op, "lse", *lse_, {a.B, a.H, a.Lq}, ScalarType::Float);
    lse = contiguous(*lse_, ScalarType::Float);
    a.lse = floats(lse);
  }
  Tensor importance = zeros({a.B, a.max_keys});
  if (query.numel() == 0 || a.max_keys == 0) return importance;
  a.components = a.B * a.H;
  a.key = strided(key);
  a.importance = floats(importance);
  const Kernels& k = kernels();
  Tensor maximum, sum;
  if (!a.lse) {
    maximum = empty_numbers(query), sum = empty_numbers(query);
    a.maximum = floats(maximum), a.sum = floats(sum);
    a.panels = panels_of_forward(a);
    run(k.token_importance_sums, a, a.components * parts(a.max_queries, a.panels * k.tile),
        k.forward_workspace(a.D, a.panels, a.max_keys));
  }
  run(k.token_importance, a, a.B * parts(a.max_keys, k.tile), k.backward_workspace(a.D, k.tile, k.tile, 0));
  return importance;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) { VATTN_OPERATOR(m, "token_importance", token_importance); }

}  // namespace vattn
