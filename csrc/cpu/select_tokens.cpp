// vattn::select_tokens and its backward on the CPU: which tokens stay, in one pass, and their rows in another.
#include <cmath>
#include <cstring>
#include <numeric>

#include "host.h"

namespace vattn {
namespace {

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

// Calls f(b, row of all, row of the kept) for the global tokens and the kept of every sample.
template <class F>
void each_kept(int64_t B, int64_t G, int64_t keep, const int64_t* kept, F f) {
  torch::stable::parallel_for(0, B * (G + keep), 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t b = i / (G + keep), row = i % (G + keep);
      f(b, row < G ? row : G + kept[b * keep + row - G], row);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& tokens, const Tensor& importance, int64_t keep,
                                           const MaybeTensor& positions, int64_t num_global) {
  check_value(tokens.dim() == 3 && importance.dim() == 2,
              "select_tokens: tokens and importance must have 3 and 2 axes");
  Tensor x = with_rows(tokens), scores = contiguous(importance, ScalarType::Float);
  const int64_t B = x.size(0), N = scores.size(1), G = num_global;
  check_value(scores.size(0) == B && x.size(1) == G + N && 0 <= keep && keep <= N,
              "select_tokens: tokens, importance, keep and num_global must fit each other");
  Tensor index = empty({B, keep}, ScalarType::Long), kept_positions = empty({B, keep}, ScalarType::Long);
  Tensor out = empty({B, G + keep, x.size(2)}, x.scalar_type()), places;
  int64_t *kept = index.mutable_data_ptr<int64_t>(), *place = kept_positions.mutable_data_ptr<int64_t>();
  const int64_t* place_of = nullptr;
  if (positions.has_value()) {
    places = contiguous(*positions, ScalarType::Long), place_of = places.const_data_ptr<int64_t>();
    check_value(places.size(-1) == N && places.numel() == (places.dim() == 1 ? N : B * N),
                "select_tokens: positions must have shape (", N, ",) or (", B, ", ", N, "), got ", places.sizes());
  }
  const int64_t places_step = positions.has_value() && places.dim() == 2 ? N : 0;
  const float* score = floats(scores);
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) largest(score + b * N, N, keep, kept + b * keep);
    for (int64_t i = begin * keep; i < end * keep; ++i)
      place[i] = place_of ? place_of[i / keep * places_step + kept[i]] : kept[i];
  });
  Bytes from(x), to(out);
  each_kept(B, G, keep, kept, [&](int64_t b, int64_t row, int64_t i) {
    std::memcpy(to.at(b, i), from.at(b, row), to.count);
  });
  return {out, kept_positions, index};
}

Tensor backward(const Tensor& grad_kept, const Tensor& kept_index, int64_t num_tokens, int64_t num_global) {
  Tensor x = contiguous(grad_kept, grad_kept.scalar_type()), index = contiguous(kept_index, ScalarType::Long);
  Tensor grad = torch::stable::new_zeros(x, {x.size(0), num_global + num_tokens, x.size(2)});
  Bytes from(x), to(grad);
  const int64_t* kept = index.const_data_ptr<int64_t>();
  each_kept(x.size(0), num_global, index.size(1), kept, [&](int64_t b, int64_t row, int64_t i) {
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
