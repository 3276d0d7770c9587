// vattn::edge_sparse_attention, its backward and its tangent on the CPU.
#include <torch/library.h>

#include "host_positions.h"

namespace vattn {
namespace {

constexpr const char* OP = "edge_sparse_attention";

// The arguments of the kernels, and what they point to.
struct Call {
  EdgeSparseAttention a{};
  at::Tensor query, key, value, row_offsets, columns;
  int64_t N;
  HostPositions positions;

  Call(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, const at::Tensor& row_offsets_,
       const at::Tensor& columns_, int64_t block_size, int64_t num_global, const std::optional<at::Tensor>& bias_table,
       at::IntArrayRef window, const std::optional<at::Tensor>& positions_, bool causal, double dropout_p,
       const std::optional<at::Tensor>& seed, double scale)
      : query(with_rows(query_)), key(with_rows(key_)), value(with_rows(value_)),
        row_offsets(row_offsets_.to(at::kInt).contiguous()), columns(columns_.to(at::kInt).contiguous()),
        N(query.size(2) - num_global),
        positions(OP, query.size(0), query.size(1), N, num_global, bias_table, window, positions_, causal) {
    set_attention(OP, a, query, dropout_p, seed, scale);
    for (const at::Tensor& x : {key, value})
      TORCH_CHECK_VALUE(x.sizes() == query.sizes() && x.scalar_type() == query.scalar_type(), OP,
                        ": query, key and value must have one shape and dtype");
    TORCH_CHECK_VALUE(block_size >= 1 && num_global >= 0 && N >= 0, OP, ": the layout does not fit the query");
    a.Lq = query.size(2), a.G = num_global, a.block_size = block_size, a.blocks = parts(N, block_size);
    set_layout();
    a.max_queries = std::max(a.G, std::min(block_size, N)), a.max_keys = a.Lq;
    a.components = a.B * a.H * (a.blocks + 1);
    a.query = video(query), a.key = video(key), a.value = video(value);
    a.positions = positions.args;
    a.slices = 1;
  }

  void set_layout() {
    TORCH_CHECK_VALUE(row_offsets.dim() == 2 && row_offsets.size(1) == a.blocks + 1 &&
                          (row_offsets.size(0) == 1 || row_offsets.size(0) == a.H),
                      OP, ": row_offsets must have shape (1 or ", a.H, ", ", a.blocks + 1, "), got ",
                      row_offsets.sizes());
    a.layouts = row_offsets.size(0);
    a.row_offsets = row_offsets.data_ptr<int32_t>(), a.columns = columns.data_ptr<int32_t>();
    for (int64_t i = 0, last = 0; i < row_offsets.numel(); last = a.row_offsets[i++])
      TORCH_CHECK_VALUE(last <= a.row_offsets[i] && a.row_offsets[i] <= columns.numel(), OP,
                        ": row_offsets must not fall, nor pass the end of columns");
    for (int64_t i = 0; i < columns.numel(); ++i)
      TORCH_CHECK_VALUE(0 <= a.columns[i] && a.columns[i] < a.blocks, OP, ": columns must be from 0 to below ",
                        a.blocks, ", got ", a.columns[i]);
  }
};

// The probability that the first global query gives each key, averaged over heads.
at::Tensor importance_of(const at::Tensor& scores, const at::Tensor& lse) {
  return at::sub(scores, lse.narrow(2, 0, 1), M_LOG2E).exp2_().mean(1);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& row_offsets,
    const at::Tensor& columns, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, int64_t block_size,
    int64_t num_global, const std::optional<at::Tensor>& bias_table, at::IntArrayRef window,
    const std::optional<at::Tensor>& positions, bool causal, double dropout_p, const std::optional<at::Tensor>& seed,
    double scale, bool importance) {
  Call call(query, key, value, row_offsets, columns, block_size, num_global, bias_table, window, positions, causal,
            dropout_p, seed, scale);
  EdgeSparseAttention& a = call.a;
  TORCH_CHECK_VALUE(!importance || num_global > 0, "edge_sparse_attention: importance needs a global token");
  at::Tensor out = empty_rows(call.query), lse = empty_sums(call.query);
  at::Tensor scores = at::empty({importance ? a.B : 0, a.H, call.N}, at::kFloat);
  if (out.numel() > 0) {
    a.out = video(out), a.lse = lse.data_ptr<float>();
    a.importance = importance ? scores.data_ptr<float>() : nullptr;
    a.panels = panels_of_item(a, kernels().tile);
    run_forward(kernels().edge_sparse_attention, a);
  }
  return {out, lse, importance ? importance_of(scores, lse) : at::empty({0}, at::kFloat)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out_, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out_, const at::Tensor& lse_,
    const at::Tensor& row_offsets, const at::Tensor& columns, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, int64_t block_size, int64_t num_global,
    const std::optional<at::Tensor>& bias_table, at::IntArrayRef window, const std::optional<at::Tensor>& positions,
    bool causal, double dropout_p, const std::optional<at::Tensor>& seed, double scale) {
  Call call(query, key, value, row_offsets, columns, block_size, num_global, bias_table, window, positions, causal,
            dropout_p, seed, scale);
  EdgeSparseAttention& a = call.a;
  at::Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = lse_.contiguous();
  at::Tensor grad_query = empty_rows(call.query), grad_key = empty_rows(call.query), grad_value = empty_rows(call.query);
  at::Tensor delta = start_delta(lse, grad_lse), keys = grad_key, values = grad_value;
  const Kernels& k = kernels();
  // A thread takes a head at a time; where there are too few, each range of blocks is an item of its own.
  const int64_t heads = a.B * a.H;
  if (heads > 0) a.slices = std::clamp<int64_t>(parts(at::get_num_threads(), heads), 1, a.blocks + 1);
  if (a.slices > 1) {
    keys = at::empty({a.slices, a.B, a.H, a.Lq, a.D}, at::kFloat), values = at::empty_like(keys);
    a.slice_grad = keys.stride(0);
  }
  at::Tensor grad_bias = call.positions.start_grads(bias_table.has_value() ? a.slices * heads : 0);
  a.grad_bias = HostPositions::first(grad_bias);
  if (query.numel() > 0) {
    a.out = video(out), a.grad_out = video(grad_out), a.grad_query = video(grad_query);
    a.grad_key = video(a.slices > 1 ? keys[0] : keys), a.grad_value = video(a.slices > 1 ? values[0] : values);
    a.lse = lse.data_ptr<float>(), a.delta = delta.data_ptr<float>();
    a.chunk = std::min(std::max(k.tile, CACHED_FLOATS / a.D / k.tile * k.tile), parts(a.max_queries, k.tile) * k.tile);
    run(k.edge_sparse_attention.backward, a, a.slices * heads, k.backward_workspace(a.D, a.chunk, a.chunk + 1, a.Lq));
  }
  if (a.slices > 1) grad_key.copy_(keys.sum(0)), grad_value.copy_(values.sum(0));
  at::Tensor grad_table = at::empty({0}, at::kFloat);
  if (bias_table.has_value()) grad_table = call.positions.finish_grads(grad_bias, a.H);
  return {grad_query, grad_key, grad_value, grad_table};
}

std::tuple<at::Tensor, at::Tensor> tangent(
    const at::Tensor& query_tangent, const at::Tensor& key_tangent, const at::Tensor& value_tangent,
    const std::optional<at::Tensor>& table_tangent, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse, const at::Tensor& row_offsets,
    const at::Tensor& columns, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, int64_t block_size, int64_t num_global, const std::optional<at::Tensor>& bias_table,
    at::IntArrayRef window, const std::optional<at::Tensor>& positions, bool causal, double dropout_p,
    const std::optional<at::Tensor>& seed, double scale) {
  Call call(query, key, value, row_offsets, columns, block_size, num_global, bias_table, window, positions, causal,
            dropout_p, seed, scale);
  EdgeSparseAttention& a = call.a;
  if (table_tangent.has_value()) {
    TORCH_CHECK_VALUE(bias_table.has_value(), OP, ": table_tangent must come with a bias_table, got bias_table=None");
    check_like(OP, "table_tangent", *table_tangent, "bias_table", bias_table->sizes(), bias_table->scalar_type());
    call.positions.set_tangent(*table_tangent);
    a.positions = call.positions.args;
  }
  return run_tangent(OP, kernels().edge_sparse_attention, a, video, query_tangent, key_tangent, value_tangent,
                     call.query, call.key, call.value, out, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("edge_sparse_attention", forward);
  m.impl("edge_sparse_attention_backward", backward);
  m.impl("edge_sparse_attention_jvp", tangent);
}

}  // namespace vattn
