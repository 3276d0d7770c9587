// vattn::token_importance on the CPU.
#include <torch/library.h>

#include "host_positions.h"

namespace vattn {
namespace {

at::Tensor token_importance(const at::Tensor& query_, const at::Tensor& key_,
                            const std::optional<at::Tensor>& bias_table, at::IntArrayRef window, int64_t num_global,
                            const std::optional<at::Tensor>& positions_, const std::optional<at::Tensor>& key_lengths,
                            double scale) {
  const char* op = "token_importance";
  at::Tensor query = with_rows(query_), key = with_rows(key_), lengths;
  TokenImportance a{};
  set_attention(op, a, query, 0, std::nullopt, scale);
  a.Lq = a.max_queries = query.size(2), a.max_keys = key.size(2);
  TORCH_CHECK_VALUE(key.size(0) == a.B && key.size(1) == a.H && key.size(3) == a.D &&
                        key.scalar_type() == query.scalar_type(),
                    op, ": key must fit the query in all but its length");
  TORCH_CHECK_VALUE(!bias_table.has_value() || a.Lq == a.max_keys, op,
                    ": a bias is for queries and keys of the same tokens");
  HostPositions positions(op, a.B, a.H, a.max_keys - num_global, num_global, bias_table, window, positions_,
                          /*is_causal=*/false);
  a.positions = positions.args;
  if (key_lengths.has_value()) {
    lengths = key_lengths->to(at::kLong).contiguous();
    a.key_lengths = lengths.data_ptr<int64_t>();
    for (int64_t b = 0; b < a.B; ++b)
      TORCH_CHECK_VALUE(0 <= a.key_lengths[b] && a.key_lengths[b] <= a.max_keys, op,
                        ": key_lengths must be between 0 and the number of keys (", a.max_keys, "), got key_lengths[", b,
                        "]=", a.key_lengths[b]);
  }
  at::Tensor importance = at::zeros({a.B, a.max_keys}, at::kFloat), maximum = empty_sums(query), sum = empty_sums(query);
  if (query.numel() == 0 || a.max_keys == 0) return importance;
  a.components = a.B * a.H;
  a.query = video(query), a.key = video(key);
  a.maximum = maximum.data_ptr<float>(), a.sum = sum.data_ptr<float>(), a.importance = importance.data_ptr<float>();
  const Kernels& k = kernels();
  a.panels = panels_of_item(a, k.tile);
  run(k.token_importance_sums, a, a.components * parts(a.max_queries, a.panels * k.tile),
      k.forward_workspace(a.D, a.panels));
  run(k.token_importance, a, a.B * parts(a.max_keys, k.tile), k.backward_workspace(a.D, k.tile, k.tile, 0));
  return importance;
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) { m.impl("token_importance", token_importance); }

}  // namespace vattn
