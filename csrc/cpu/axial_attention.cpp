// vattn::axial_attention, its backward and its tangent on the CPU.
#include <algorithm>

#include "host_attention.h"

namespace vattn {
namespace {

constexpr const char* OP = "axial_attention";

// The memory of x from its first element on, with other sizes and strides.
Tensor reinterpreted(const Tensor& x, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  constexpr int64_t AT = 0;  // of x, not of its storage
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), (int64_t)sizes.size(), sizes.data(), strides.data(), AT, &handle));
  return Tensor(handle);
}

// Grids (B, H, *grid) and (B, H, *grid, D), whose axes before the line are one to the kernels, and those behind it, too.
class Grid {
  Sizes sizes;  // of the query
  ScalarType dtype;
  int64_t line;  // its axis

  // Axes [begin, end) of x as one: its size and its stride; or false, if that is not how they lie. What is empty lies in
  // any way.
  static bool as_one(const Tensor& x, int64_t begin, int64_t end, int64_t& size, int64_t& stride) {
    size = 1, stride = 0;
    for (int64_t axis = end - 1; axis >= begin; --axis) {
      if (x.size(axis) == 1) continue;
      if (size == 1) stride = x.stride(axis);
      else if (x.stride(axis) != size * stride && x.numel() > 0) return false;
      size *= x.size(axis);
    }
    return true;
  }

 public:
  Grid(const Tensor& query, int64_t dim) : dtype(ScalarType::Float) {
    check_here(OP, "query", query);
    sizes = query.sizes(), dtype = query.scalar_type(), line = 2 + dim;
    check_value(query.dim() >= 4, OP, ": query must have an axis in its grid, got query.shape=", sizes);
    check_range(OP, "dim", dim, 0, query.dim() - 4);
    checked_product(OP, "query.shape", sizes);
  }

  Sizes numbers() const { return sizes.slice(0, sizes.size() - 1); }

  // x (B, H, *grid, D), or (B, H, *grid) with `rows` off, as (B, H, outer, line, inner, ...); a copy if need be.
  Tensor lines(Name name, const Tensor& x, bool rows = true) const {
    if (rows) check_tensor(OP, name, x, sizes, dtype);
    else check_tensor(OP, name, x, numbers(), ScalarType::Float);
    const int64_t last = 2 + (int64_t)sizes.size() - 3;
    int64_t outer, inner, outer_stride, inner_stride;
    if (!as_one(x, 2, line, outer, outer_stride) || !as_one(x, line + 1, last, inner, inner_stride))
      return lines(name, torch::stable::contiguous(x), rows);
    std::vector<int64_t> shape = {x.size(0), x.size(1), outer, x.size(line), inner};
    std::vector<int64_t> strides = {x.stride(0), x.stride(1), outer_stride, x.stride(line), inner_stride};
    if (rows) shape.push_back(x.size(last)), strides.push_back(x.stride(last));
    return reinterpreted(x, shape, strides);
  }

  // What was made as (B, H, outer, line, inner, ...), as a grid again. Its axes lie in raster order.
  Tensor grid(const Tensor& x) const {
    const Sizes from = x.strides();
    const std::vector<int64_t> shape(sizes.begin(), sizes.begin() + sizes.size() - (6 - x.dim()));
    if (x.numel() == 0) return x.dim() == 6 ? empty_rows_of(shape, x.scalar_type()) : empty(shape, x.scalar_type());
    std::vector<int64_t> strides(shape.size(), 0);
    strides[0] = from[0], strides[1] = from[1];
    int64_t step = from[2];
    for (int64_t axis = line - 1; axis >= 2; --axis) strides[axis] = step, step *= std::max<int64_t>(shape[axis], 1);
    strides[line] = from[3], step = from[4];
    const int64_t last = (int64_t)sizes.size() - 2;
    for (int64_t axis = last; axis > line; --axis) strides[axis] = step, step *= std::max<int64_t>(shape[axis], 1);
    if (x.dim() == 6) strides.back() = from[5];
    return reinterpreted(x, shape, strides);
  }
};

struct AxialCall : AttentionCall<AxialAttention> {
  AxialCall(const Grid& grid, const Tensor& query, const Tensor& key, const Tensor& value, double dropout_p,
            const MaybeTensor& seed, double scale)
      : AttentionCall(OP, kernels().axial_attention, 6, Tokens::OfQuery, grid.lines("query", query),
                      grid.lines("key", key), grid.lines("value", value), dropout_p, seed, scale) {
    a.outer = this->query.size(2), a.line = this->query.size(3), a.inner = this->query.size(4);
    constexpr int64_t ROWS_WORTH_A_PANEL = 16;  // products of fewer rows take as long
    a.lines = std::max<int64_t>(1, ROWS_WORTH_A_PANEL / std::max<int64_t>(a.line, 1));
    a.components = a.B * a.H * parts(a.outer * a.inner, a.lines);
    a.max_queries = a.max_keys = a.lines * a.line;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value, int64_t dim,
                                   double dropout_p, const MaybeTensor& seed, double scale) {
  const Grid grid(query, dim);
  auto [out, lse] = AxialCall(grid, query, key, value, dropout_p, seed, scale).forward();
  return {grid.grid(out), grid.grid(lse)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& query,
                                            const Tensor& key, const Tensor& value, const Tensor& out,
                                            const Tensor& lse, int64_t dim, double dropout_p, const MaybeTensor& seed,
                                            double scale) {
  const Grid grid(query, dim);
  MaybeTensor lines_lse;
  if (grad_lse.has_value()) lines_lse = grid.lines("grad_lse", *grad_lse, false);
  auto [grad_query, grad_key, grad_value] =
      AxialCall(grid, query, key, value, dropout_p, seed, scale)
          .backward(grid.lines("grad_out", grad_out), lines_lse, grid.lines("out", out), grid.lines("lse", lse, false));
  return {grid.grid(grad_query), grid.grid(grad_key), grid.grid(grad_value)};
}

std::tuple<Tensor, Tensor> tangent(const Tensor& query_tangent, const Tensor& key_tangent, const Tensor& value_tangent,
                                   const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
                                   const Tensor& lse, int64_t dim, double dropout_p, const MaybeTensor& seed,
                                   double scale) {
  const Grid grid(query, dim);
  auto [out_tangent, lse_tangent] =
      AxialCall(grid, query, key, value, dropout_p, seed, scale)
          .tangent(grid.lines("query_tangent", query_tangent), grid.lines("key_tangent", key_tangent),
                   grid.lines("value_tangent", value_tangent), grid.lines("out", out), grid.lines("lse", lse, false));
  return {grid.grid(out_tangent), grid.grid(lse_tangent)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  VATTN_OPERATOR(m, "axial_attention", forward);
  VATTN_OPERATOR(m, "axial_attention_backward", backward);
  VATTN_OPERATOR(m, "axial_attention_jvp", tangent);
}

}  // namespace vattn
