// vattn::select_tokens and its backward on the CPU: which tokens stay, in one pass, and their rows in another.
#include <cmath>
#include <cstring>
#include <numeric>

#include "host.h"

namespace vattn {
namespace {

constexpr const char* OP = "select_tokens";

// The indices of the `keep` largest of N numbers, ascending. A NaN is larger than any number; of equals the first stay.
void largest(const float* x, int64_t N, int64_t keep, int64_t* kept) {
  auto before = [x](int64_t i, int64_t j) {
    if (std::isnan(x[i]) || std::isnan(x[j])) return std::isnan(x[i]) && (!std::isnan(x[j]) || i < j);
    return x[i] > x[j] || (x[i] == x[j] && i < j);
  };
  std::vector<int64_t> order(N);
  std::iota(order.begin(), order.end(), 0);
  if (keep < N) std::nth_element(order.begin(), order.begin() + keep, order.end(), before);
  std::copy(order.begin(), order.begin() + keep, kept);
  std::sort(kept, kept + keep);
}

// Rows (B, rows, C) as bytes.
struct Bytes {
  char* data;
  int64_t batch, row, count;
  explicit Bytes(const Tensor& x)
      : data((char*)x.data_ptr()), batch(x.stride(0) * size_of(x)), row(x.stride(1) * size_of(x)),
        count(x.size(2) * size_of(x)) {}
  static int64_t size_of(const Tensor& x) { return (int64_t)x.element_size(); }
  char* at(int64_t b, int64_t i) const { return data + b * batch + i * row; }
};

// Calls f(b, row of all, row of the kept) for the global tokens and the kept of every sample of x (B, tokens, C).
template <class F>
void each_kept(const Tensor& x, int64_t G, int64_t keep, const int64_t* kept, F f) {
  if (x.size(2) == 0) return;  // rows of nothing may lie nowhere
  torch::stable::parallel_for(0, x.size(0) * (G + keep), 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t b = i / (G + keep), row = i % (G + keep);
      f(b, row < G ? row : G + kept[b * keep + row - G], row);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& tokens, const Tensor& importance, int64_t keep,
                                           const MaybeTensor& positions, int64_t num_global) {
  dtype_of(OP, "tokens", tokens);
  check_tensor(OP, "tokens", tokens, {ANY, ANY, ANY}, tokens.scalar_type());
  const int64_t B = tokens.size(0), G = num_global;
  check_range(OP, "num_global", G, 0, tokens.size(1));
  const int64_t N = tokens.size(1) - G;
  check_tensor(OP, "importance", importance, {B, N}, ScalarType::Float);
  check_range(OP, "keep", keep, 0, N);
  Tensor x = with_rows(tokens), scores = contiguous(importance, ScalarType::Float), places;
  const int64_t* place_of = nullptr;
  if (positions.has_value()) {
    places = checked_positions(OP, *positions, B, N);
    place_of = places.const_data_ptr<int64_t>();
  }
  Tensor index = empty({B, keep}, ScalarType::Long), kept_positions = empty({B, keep}, ScalarType::Long);
  Tensor out = empty({B, G + keep, x.size(2)}, x.scalar_type());
  int64_t *kept = index.mutable_data_ptr<int64_t>(), *place = kept_positions.mutable_data_ptr<int64_t>();
  const int64_t places_step = positions.has_value() && places.dim() == 2 ? N : 0;
  const float* score = floats(scores);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) largest(score + b * N, N, keep, kept + b * keep);
    for (int64_t i = begin * keep; i < end * keep; ++i)
      place[i] = place_of ? place_of[i / keep * places_step + kept[i]] : kept[i];
  });
  Bytes from(x), to(out);
  each_kept(x, G, keep, kept, [&](int64_t b, int64_t row, int64_t i) {
    std::memcpy(to.at(b, i), from.at(b, row), to.count);
  });
  return {out, kept_positions, index};
}

Tensor backward(const Tensor& grad_kept, const Tensor& kept_index, int64_t num_tokens, int64_t num_global) {
  dtype_of(OP, "grad_kept", grad_kept);
  check_tensor(OP, "grad_kept", grad_kept, {ANY, ANY, ANY}, grad_kept.scalar_type());
  check_range(OP, "num_global", num_global, 0, grad_kept.size(1));
  const int64_t B = grad_kept.size(0), K = grad_kept.size(1) - num_global, C = grad_kept.size(2);
  check_range(OP, "num_tokens", num_tokens, K, std::numeric_limits<int64_t>::max() - num_global);
  const int64_t bytes = (int64_t)grad_kept.element_size(), sizes[] = {B, num_global + num_tokens, C, bytes};
  checked_product(OP, "grad_tokens.shape", sizes);
  check_tensor(OP, "kept_index", kept_index, {B, K}, ScalarType::Long);
  Tensor index = checked_numbers<int64_t>(OP, "kept_index", kept_index, {B, K}, "the last token", num_tokens - 1);
  const int64_t* kept = index.const_data_ptr<int64_t>();
  for (int64_t i = 1; i < B * K; ++i)
    check_value(i % K == 0 || kept[i - 1] < kept[i], OP, ": kept_index must ascend, got ", kept[i], " after ",
                kept[i - 1]);
  Tensor x = contiguous(grad_kept, grad_kept.scalar_type());
  Tensor grad = torch::stable::new_zeros(x, {B, num_global + num_tokens, C});
  Bytes from(x), to(grad);
  each_kept(x, num_global, K, kept, [&](int64_t b, int64_t row, int64_t i) {
    std::memcpy(to.at(b, row), from.at(b, i), from.count);
  });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  VATTN_OPERATOR(m, "select_tokens", forward);
  VATTN_OPERATOR(m, "select_tokens_backward", backward);
}

}  // namespace vattn
