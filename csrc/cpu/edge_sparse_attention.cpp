// vattn::edge_sparse_attention and its backward on the CPU.
#include <torch/library.h>

#include "host.h"

namespace vattn {
namespace {

constexpr float LOG2E = 1.44269504088896340736f;
constexpr int64_t PAD = 16;  // floats before and after a table, which vectors at its ends read or write

// The position of each token, (N,) or (B, N), checked.
at::Tensor checked_positions(const at::Tensor& positions, int64_t B, int64_t N, int64_t cells) {
  at::Tensor p = positions.to(at::kLong).contiguous();
  TORCH_CHECK_VALUE(p.size(-1) == N && (p.dim() == 1 || (p.dim() == 2 && p.size(0) == B)),
                    "edge_sparse_attention: positions must have shape (N,) or (B, N), got ", p.sizes());
  const int64_t* at = p.data_ptr<int64_t>();
  for (int64_t i = 0; i < p.numel(); ++i)
    TORCH_CHECK_VALUE(0 <= at[i] && at[i] < cells, "edge_sparse_attention: positions must be from 0 to below ", cells,
                      ", got a position of ", at[i]);
  return p;
}

// The arguments of the kernels, and what they point to.
struct Call {
  EdgeSparseAttention a{};
  at::Tensor query, key, value, row_offsets, columns, positions, codes, table;
  int64_t N;

  Call(const at::Tensor& query_, const at::Tensor& key_, const at::Tensor& value_, const at::Tensor& row_offsets_,
       const at::Tensor& columns_, int64_t block_size, int64_t num_global, const std::optional<at::Tensor>& bias_table,
       at::IntArrayRef window, const std::optional<at::Tensor>& positions_, bool causal, bool table_reversed,
       double dropout_p, const std::optional<at::Tensor>& seed, double scale)
      : query(with_rows(query_)), key(with_rows(key_)), value(with_rows(value_)),
        row_offsets(row_offsets_.to(at::kInt).contiguous()), columns(columns_.to(at::kInt).contiguous()) {
    const char* op = "edge_sparse_attention";
    set_attention(op, a, query, dropout_p, seed, scale);
    for (const at::Tensor& x : {key, value})
      TORCH_CHECK_VALUE(x.sizes() == query.sizes() && x.scalar_type() == query.scalar_type(),
                        op, ": query, key and value must have one shape and dtype");
    a.Lq = query.size(2), a.G = num_global, N = a.Lq - a.G, a.block_size = block_size;
    TORCH_CHECK_VALUE(block_size >= 1 && num_global >= 0 && N >= 0, op, ": the layout does not fit the query");
    a.blocks = parts(N, block_size);
    set_layout(op);
    a.max_queries = std::max(a.G, std::min(block_size, N)), a.max_keys = a.Lq;
    a.components = a.B * a.H * (a.blocks + 1);
    a.query = video(query), a.key = video(key), a.value = video(value);
    a.bias.G = a.G;
    at::Tensor place;
    bool biased = bias_table.has_value();
    if (biased || causal) {
      int64_t cells = biased ? c10::multiply_integers(window) : INT32_MAX;
      place = checked_positions(positions_.has_value() ? *positions_ : at::arange(N, at::kLong), a.B, N, cells);
    }
    if (causal) {
      positions = place.to(at::kInt);
      a.positions = positions.data_ptr<int32_t>();
      a.positions_batch = place.dim() == 2 ? N : 0;
    }
    if (biased) set_bias(*bias_table, window, place, table_reversed);
  }

  void set_layout(const char* op) {
    TORCH_CHECK_VALUE(row_offsets.dim() == 2 && row_offsets.size(1) == a.blocks + 1 &&
                          (row_offsets.size(0) == 1 || row_offsets.size(0) == a.H),
                      op, ": row_offsets must have shape (1 or ", a.H, ", ", a.blocks + 1, "), got ",
                      row_offsets.sizes());
    a.layouts = row_offsets.size(0);
    a.row_offsets = row_offsets.data_ptr<int32_t>(), a.columns = columns.data_ptr<int32_t>();
    for (int64_t i = 0, last = 0; i < row_offsets.numel(); last = a.row_offsets[i++])
      TORCH_CHECK_VALUE(last <= a.row_offsets[i] && a.row_offsets[i] <= columns.numel(), op,
                        ": row_offsets must not fall, nor pass the end of columns");
    for (int64_t i = 0; i < columns.numel(); ++i)
      TORCH_CHECK_VALUE(0 <= a.columns[i] && a.columns[i] < a.blocks, op, ": columns must be from 0 to below ",
                        a.blocks, ", got ", a.columns[i]);
  }

  // The table (R, H) as (H, R) in units of log2, with the differences reversed for the backward.
  void set_bias(const at::Tensor& bias, at::IntArrayRef window, const at::Tensor& place, bool reversed) {
    int64_t h = 2 * window[1] - 1, w = 2 * window[2] - 1;
    PositionBias& p = a.bias;
    p.differences = (2 * window[0] - 1) * h * w, p.middle = p.differences / 2;
    TORCH_CHECK_VALUE(bias.dim() == 2 && bias.size(1) == a.H &&
                          bias.size(0) == p.differences + 2 * a.G + a.G * a.G,
                      "edge_sparse_attention: the bias table must have shape (",
                      p.differences + 2 * a.G + a.G * a.G, ", ", a.H, "), got ", bias.sizes());
    p.table_head = bias.size(0) + 2 * PAD;
    table = at::empty({a.H, p.table_head}, at::kFloat);
    at::Tensor from_table = bias.to(at::kFloat).contiguous();
    const float* entry = from_table.data_ptr<float>();
    float* row = table.data_ptr<float>() + PAD;
    at::parallel_for(0, bias.size(0), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t at = reversed && i < p.differences ? p.differences - 1 - i : i;
        for (int64_t h = 0; h < a.H; ++h) row[h * p.table_head + at] = LOG2E * entry[i * a.H + h];
      }
    });
    p.table = table.data_ptr<float>() + PAD;
    codes = at::empty(place.sizes(), at::kInt);
    p.codes = codes.data_ptr<int32_t>(), p.codes_batch = place.dim() == 2 ? N : 0;
    const int64_t* from = place.data_ptr<int64_t>();
    int32_t* to = codes.data_ptr<int32_t>();
    for (int64_t i = 0; i < place.numel(); ++i) {
      int64_t x = from[i] % window[2], y = from[i] / window[2] % window[1], t = from[i] / window[2] / window[1];
      to[i] = (int32_t)((t * h + y) * w + x);
    }
  }

  at::Tensor entries(const at::Tensor& padded) const { return padded.narrow(-1, PAD, a.bias.table_head - 2 * PAD); }
  void reverse(const at::Tensor& padded) const {
    at::Tensor differences = padded.narrow(-1, PAD, a.bias.differences);
    differences.copy_(differences.flip(-1));
  }
};

// The probability that the first global query gives each key, averaged over heads.
at::Tensor importance_of(const at::Tensor& scores, const at::Tensor& lse) {
  return at::sub(scores, lse.narrow(2, 0, 1) * LOG2E).exp2_().mean(1);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& row_offsets,
    const at::Tensor& columns, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, int64_t block_size,
    int64_t num_global, const std::optional<at::Tensor>& bias_table, at::IntArrayRef window,
    const std::optional<at::Tensor>& positions, bool causal, double dropout_p, const std::optional<at::Tensor>& seed,
    double scale, bool importance) {
  Call call(query, key, value, row_offsets, columns, block_size, num_global, bias_table, window, positions, causal,
            /*table_reversed=*/false, dropout_p, seed, scale);
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
    bool causal, double dropout_p, const std::optional<at::Tensor>& seed, double scale, bool /*deterministic: always*/) {
  Call call(query, key, value, row_offsets, columns, block_size, num_global, bias_table, window, positions, causal,
            /*table_reversed=*/true, dropout_p, seed, scale);
  EdgeSparseAttention& a = call.a;
  at::Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = lse_.contiguous();
  at::Tensor grad_query = empty_rows(call.query), grad_key = empty_rows(call.query), grad_value = empty_rows(call.query);
  at::Tensor delta = start_delta(lse, grad_lse), grad_table = at::empty({0}, at::kFloat), grad_bias;
  const Kernels& k = kernels();
  // A thread takes a head at a time; where there are too few, each range of blocks is an item of its own.
  int64_t heads = a.B * a.H;
  a.slices = heads == 0 ? 1 : std::clamp<int64_t>(parts(at::get_num_threads(), heads), 1, a.blocks + 1);
  at::Tensor keys, values;
  if (a.slices > 1) {
    auto sizes = call.query.sizes().vec();
    sizes.insert(sizes.begin(), a.slices);
    keys = at::empty(sizes, at::kFloat), values = at::empty(sizes, at::kFloat);
    a.slice_grad = keys.stride(0);
  }
  if (bias_table.has_value()) {
    grad_bias = at::zeros({a.slices, a.B, a.H, a.bias.table_head}, at::kFloat);
    a.grad_bias = grad_bias.data_ptr<float>() + PAD;
  }
  if (query.numel() > 0) {
    a.out = video(out), a.grad_out = video(grad_out), a.grad_query = video(grad_query);
    a.grad_key = video(a.slices > 1 ? keys[0] : grad_key), a.grad_value = video(a.slices > 1 ? values[0] : grad_value);
    a.lse = lse.data_ptr<float>(), a.delta = delta.data_ptr<float>();
    run_delta(k.edge_sparse_attention, a);
    a.chunk = std::min(std::max(k.tile, CACHED_FLOATS / a.D / k.tile * k.tile), parts(a.max_queries, k.tile) * k.tile);
    run(k.edge_sparse_attention.backward, a, a.slices * heads,
        k.backward_workspace(a.D, a.chunk, a.chunk + 1, a.Lq));
  }
  if (a.slices > 1) grad_key.copy_(keys.sum(0)), grad_value.copy_(values.sum(0));
  if (bias_table.has_value()) {
    at::Tensor sum = grad_bias.sum(at::IntArrayRef{0, 1});
    call.reverse(sum);
    grad_table = call.entries(sum).t().contiguous();
  }
  return {grad_query, grad_key, grad_value, grad_table};
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("edge_sparse_attention", forward);
  m.impl("edge_sparse_attention_backward", backward);
}

}  // namespace vattn
