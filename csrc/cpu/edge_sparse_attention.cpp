// vattn::edge_sparse_attention, its backward and its tangent on the CPU.
#include <cmath>

#include "host_attention.h"
#include "host_positions.h"

namespace vattn {
namespace {

using Ints = std::vector<int64_t>;

struct EdgeSparseCall : AttentionCall<EdgeSparseAttention> {
  Tensor row_offsets, columns;
  std::vector<int32_t> tokens, begins;
  std::vector<int64_t> keys_before;
  int64_t N;
  HostPositions positions;
  bool importance;
  Tensor grad_bias;

  // The transposed layout, which the backward on a GPU needs, is not looked at.
  EdgeSparseCall(const Tensor& query_, const Tensor& key, const Tensor& value, const Tensor& row_offsets_,
                 const Tensor& columns_, const MaybeTensor&, const MaybeTensor&, const MaybeTensor& order,
                 int64_t block_size, int64_t num_global, const MaybeTensor& bias_table, const Ints& window,
                 const MaybeTensor& positions_, bool causal, double dropout_p, const MaybeTensor& seed, double scale,
                 bool importance)
      : AttentionCall("edge_sparse_attention", kernels().edge_sparse_attention, 4, Tokens::OfQuery, query_, key, value,
                      dropout_p, seed, scale),
        N(other_tokens(op, query.size(2), num_global)),
        positions(op, a.B, a.H, N, num_global, bias_table, window, positions_, causal), importance(importance) {
    check_range(op, "block_size", block_size, 1);
    a.Lq = query.size(2), a.G = num_global;
    a.block_size = std::min(block_size, std::max<int64_t>(N, 1)), a.blocks = parts(N, a.block_size);
    if (order.has_value()) set_order(*order, block_size);
    set_layout(row_offsets_, columns_);
    if (order.has_value()) set_keys_before();
    a.max_queries = std::max(a.G, std::min(a.block_size, N)), a.max_keys = a.Lq;
    a.components = a.B * a.H * a.units();
    a.positions = positions.args;
    a.slices = 1;
  }

  // Every token stands in one slot, and -1 only behind the tokens of a block.
  void set_order(const Tensor& order_, int64_t block_size) {
    check_tensor(op, "order", order_, {ANY}, ScalarType::Int);
    check_value(order_.size(0) % block_size == 0, op, ": order must have a multiple of block_size=", block_size,
                " elements, got order.shape=", order_.sizes());
    check_range(op, "the tokens of an order", a.Lq, 0, INT32_MAX);
    const Tensor order = contiguous(order_, ScalarType::Int);
    const int32_t* slots = order.const_data_ptr<int32_t>();
    std::vector<bool> seen(N);
    tokens.reserve(a.Lq);
    for (int32_t token = 0; token < a.G; ++token) tokens.push_back(token);
    a.blocks = order.size(0) / block_size, a.block_size = std::min(block_size, std::max<int64_t>(N, 1));
    for (int64_t block = 0; block < a.blocks; ++block) {
      begins.push_back((int32_t)tokens.size());
      bool ended = false;
      for (int64_t i = block * block_size; i < (block + 1) * block_size; ++i) {
        const int32_t token = slots[i];
        ended |= token == -1;
        if (token == -1) continue;
        check_value(0 <= token && token < N, op, ": order must hold tokens below ", N, ", or -1, got ",
                    Name("order", i), "=", token);
        check_value(!ended, op, ": -1 must come last in a block of order, got ", Name("order", i), "=", token,
                    " behind a -1");
        check_value(!seen[token], op, ": order must hold every token once, got ", Name("order", i), "=", token,
                    " again");
        seen[token] = true, tokens.push_back((int32_t)a.G + token);
      }
    }
    check_value((int64_t)tokens.size() == a.Lq, op, ": order must hold each of ", N, " tokens, got ",
                (int64_t)tokens.size() - a.G);
    begins.push_back((int32_t)tokens.size());
    a.tokens = tokens.data(), a.begins = begins.data();
  }

  void set_keys_before() {
    keys_before.assign(columns.numel(), -1);
    each_row([&](int64_t i) {
      int64_t keys = 0;
      for (int32_t entry = a.row_offsets[i]; entry < a.row_offsets[i + 1]; ++entry) {
        int64_t& before = keys_before[entry];
        check_value(before < 0 || before == keys, op, ": rows must be the same or apart with an order, got column ",
                    entry, " in two that begin apart");
        before = keys, keys += a.length(a.columns[entry]);
      }
    });
    a.keys_before = keys_before.data();
  }

  // Rows (1 or H, blocks + 1), or one such set for each sample.
  void set_layout(const Tensor& row_offsets_, const Tensor& columns_) {
    check_here(op, "columns", columns_), check_here(op, "row_offsets", row_offsets_);
    const int64_t entries = columns_.numel(), axes = row_offsets_.dim();
    columns = checked_numbers<int32_t>(op, "columns", columns_, {entries}, "the last block", a.blocks - 1);
    const int64_t heads = axes > 1 && row_offsets_.size(axes - 2) == 1 ? 1 : a.H;
    const int64_t sizes[] = {a.B, heads, a.blocks + 1};
    row_offsets = checked_numbers<int32_t>(op, "row_offsets", row_offsets_, Sizes(sizes + (axes != 3), sizes + 3),
                                           "the number of columns", entries);
    a.layout_head = heads > 1 ? a.blocks + 1 : 0, a.layout_batch = axes == 3 ? heads * (a.blocks + 1) : 0;
    a.row_offsets = row_offsets.const_data_ptr<int32_t>(), a.columns = columns.const_data_ptr<int32_t>();
    each_row([&](int64_t i) {
      check_value(a.row_offsets[i] <= a.row_offsets[i + 1], op, ": row_offsets must not fall, got row_offsets[", i + 1,
                  "]=", a.row_offsets[i + 1], " after ", a.row_offsets[i]);
    });
  }

  // Calls f(i) for the row that begins with offset i, of all sets of rows.
  template <class F>
  void each_row(F f) const {
    for (int64_t i = 0, ends = a.blocks + 1; i < row_offsets.numel(); i += ends)
      for (int64_t block = 0; block < a.blocks; ++block) f(i + block);
  }

  // With the probability (B, N) that the first global query gives each key, averaged over heads, or with nothing.
  std::tuple<Tensor, Tensor, Tensor> forward() {
    check_value(!importance || a.G > 0, op, ": importance needs a global token");
    if (!importance) return std::tuple_cat(AttentionCall::forward(), std::tuple(empty({0}, ScalarType::Float)));
    Tensor scores = empty({a.B, a.H, N}, ScalarType::Float), average = zeros({a.B, N});
    a.importance = floats(scores);
    auto [out, lse] = AttentionCall::forward();
    const float* of_queries = floats(lse);
    float* to = floats(average);
    torch::stable::parallel_for(0, a.B * N, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t bh = i / N * a.H; bh < (i / N + 1) * a.H; ++bh)
          if (a.importance[bh * N + i % N] != -INFINITY || std::isnan(of_queries[bh * a.Lq]))
            to[i] += std::exp2(a.importance[bh * N + i % N] - (float)M_LOG2E * of_queries[bh * a.Lq]);
        to[i] /= (float)a.H;
      }
    });
    return {out, lse, average};
  }

  // A thread takes a head at a time; where there are too few, each range of blocks is an item of its own.
  void run_backward(Tensor& grad_key, Tensor& grad_value) override {
    const Kernels& k = kernels();
    const int64_t heads = a.B * a.H;
    a.slices = std::clamp<int64_t>(parts(num_threads(), heads), 1, a.units());
    a.chunk = std::min(std::max(k.tile, CACHED_FLOATS / a.D / k.tile * k.tile), parts(a.max_queries, k.tile) * k.tile);
    Tensor keys = grad_key, values = grad_value;
    if (a.slices > 1) {
      keys = empty({a.slices, a.B, a.H, a.Lq, a.D}, ScalarType::Float), values = empty(keys.sizes(), ScalarType::Float);
      a.slice_grad = keys.stride(0);
    }
    a.grad_key = strided(a.slices > 1 ? torch::stable::select(keys, 0, 0) : keys);
    a.grad_value = strided(a.slices > 1 ? torch::stable::select(values, 0, 0) : values);
    if (a.positions.table) {
      grad_bias = positions.start_grads(a.slices * heads);
      a.grad_bias = positions.first(grad_bias);
    }
    run(kernel.backward, a, a.slices * heads, k.backward_workspace(a.D, a.chunk, a.chunk + 1, a.Lq));
    if (a.slices == 1) return;
    const Ints slices = {0};
    torch::stable::copy_(grad_key, torch::stable::sum(keys, slices));
    torch::stable::copy_(grad_value, torch::stable::sum(values, slices));
  }

  // With the gradient of the table, or with nothing.
  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const MaybeTensor& grad_lse,
                                                      const Tensor& out, const Tensor& lse) {
    if (a.positions.table) grad_bias = positions.start_grads(0);
    auto grads = AttentionCall::backward(grad_out, grad_lse, out, lse);
    Tensor grad_table = a.positions.table ? positions.finish_grads(grad_bias, a.H) : empty({0}, ScalarType::Float);
    return std::tuple_cat(grads, std::tuple(grad_table));
  }

  void set_table_tangent(const MaybeTensor& tangent, const MaybeTensor& table) {
    if (!tangent.has_value()) return;
    check_value(table.has_value(), op, ": table_tangent must come with a bias_table, got bias_table=None");
    check_tensor(op, "table_tangent", *tangent, table->sizes(), ScalarType::Float);
    positions.set_tangent(*tangent);
    a.positions = positions.args;
  }
};

using EdgeSparse = AttentionOperator<EdgeSparseCall, Tensor, const Tensor&, const Tensor&, const MaybeTensor&,
                                     const MaybeTensor&, const MaybeTensor&, int64_t, int64_t, const MaybeTensor&,
                                     const Ints&, const MaybeTensor&, bool, double, const MaybeTensor&, double, bool>;

// Its tangent takes that of the table besides.
std::tuple<Tensor, Tensor> tangent(
    const Tensor& query_tangent, const Tensor& key_tangent, const Tensor& value_tangent,
    const MaybeTensor& table_tangent, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& lse, const Tensor& row_offsets, const Tensor& columns, const MaybeTensor& column_offsets,
    const MaybeTensor& rows, const MaybeTensor& order, int64_t block_size, int64_t num_global,
    const MaybeTensor& bias_table, const Ints& window, const MaybeTensor& positions, bool causal, double dropout_p,
    const MaybeTensor& seed, double scale, bool importance) {
  EdgeSparseCall call(query, key, value, row_offsets, columns, column_offsets, rows, order, block_size, num_global,
                      bias_table, window, positions, causal, dropout_p, seed, scale, importance);
  call.set_table_tangent(table_tangent, bias_table);
  return call.tangent(query_tangent, key_tangent, value_tangent, out, lse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  VATTN_OPERATOR(m, "edge_sparse_attention", EdgeSparse::forward);
  VATTN_OPERATOR(m, "edge_sparse_attention_backward", EdgeSparse::backward);
  VATTN_OPERATOR(m, "edge_sparse_attention_jvp", tangent);
}

}  // namespace vattn
