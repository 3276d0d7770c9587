// vattn::token_importance on the CPU.
#include "host_attention.h"
#include "host_positions.h"

namespace vattn {
namespace {

Tensor token_importance(const Tensor& query_, const Tensor& key_, const MaybeTensor& bias_table,
                        const std::vector<int64_t>& window, int64_t num_global, const MaybeTensor& positions_,
                        const MaybeTensor& key_lengths, double scale) {
  const char* op = "token_importance";
  Tensor query = with_rows(query_), key = with_rows(key_), lengths;
  TokenImportance a{};
  set_attention(op, a, query, 4, 0, std::nullopt, scale);
  check_value(key.dim() == 4 && key.size(0) == a.B && key.size(1) == a.H && key.size(3) == a.D &&
                  key.scalar_type() == query.scalar_type(),
              op, ": key must fit the query in all but its length");
  a.Lq = a.max_queries = query.size(2), a.max_keys = key.size(2);
  check_value(!bias_table.has_value() || a.Lq == a.max_keys, op, ": a bias is for queries and keys of the same tokens");
  HostPositions positions(op, a.B, a.H, a.max_keys - num_global, num_global, bias_table, window, positions_,
                          /*is_causal=*/false);
  a.positions = positions.args;
  if (key_lengths.has_value()) {
    lengths = contiguous(*key_lengths, ScalarType::Long);
    a.key_lengths = checked_key_lengths(op, lengths, a.B, a.max_keys);
  }
  Tensor importance = zeros({a.B, a.max_keys}), maximum = empty_numbers(query), sum = empty_numbers(query);
  if (query.numel() == 0 || a.max_keys == 0) return importance;
  a.components = a.B * a.H;
  a.key = strided(key);
  a.maximum = floats(maximum), a.sum = floats(sum), a.importance = floats(importance);
  const Kernels& k = kernels();
  a.panels = panels_of_item(a);
  run(k.token_importance_sums, a, a.components * parts(a.max_queries, a.panels * k.tile),
      k.forward_workspace(a.D, a.panels));
  run(k.token_importance, a, a.B * parts(a.max_keys, k.tile), k.backward_workspace(a.D, k.tile, k.tile, 0));
  return importance;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) { VATTN_OPERATOR(m, "token_importance", token_importance); }

}  // namespace vattn
