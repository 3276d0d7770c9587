// vattn::select_tokens and its backward on the CPU: which tokens stay, in one pass, and their rows in another.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

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
  explicit Bytes(const at::Tensor& x)
      : data((char*)x.data_ptr()), batch(x.stride(0) * x.element_size()), row(x.stride(1) * x.element_size()),
        count(x.size(2) * x.element_size()) {}
  char* at(int64_t b, int64_t i) const { return data + b * batch + i * row; }
};

// Calls f(b, row of all, row of the kept) for the global tokens and the kept of every sample.
template <class F>
void each_kept(int64_t B, int64_t G, int64_t keep, const int64_t* kept, F f) {
  at::parallel_for(0, B * (G + keep), 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t b = i / (G + keep), row = i % (G + keep);
      f(b, row < G ? row : G + kept[b * keep + row - G], row);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& tokens, const at::Tensor& importance,
                                                       int64_t keep, const std::optional<at::Tensor>& positions,
                                                       int64_t num_global) {
  at::Tensor x = tokens.size(2) <= 1 || tokens.stride(2) == 1 ? tokens : tokens.contiguous();
  at::Tensor scores = importance.to(at::kFloat).contiguous();
  const int64_t B = x.size(0), N = scores.size(1), G = num_global;
  TORCH_CHECK_VALUE(scores.size(0) == B && x.size(1) == G + N && 0 <= keep && keep <= N,
                    "select_tokens: tokens, importance, keep and num_global must fit each other");
  at::Tensor index = at::empty({B, keep}, at::kLong), out = at::empty({B, G + keep, x.size(2)}, x.options());
  int64_t* kept = index.data_ptr<int64_t>();
  const float* score = scores.data_ptr<float>();
  at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) largest(score + b * N, N, keep, kept + b * keep);
  });
  Bytes from(x), to(out);
  each_kept(B, G, keep, kept, [&](int64_t b, int64_t row, int64_t i) {
    std::memcpy(to.at(b, i), from.at(b, row), to.count);
  });
  if (!positions.has_value()) return {out, index.clone(), index};
  at::Tensor places = positions->dim() == 1 ? positions->unsqueeze(0).expand({B, N}) : *positions;
  return {out, places.gather(1, index), index};
}

at::Tensor backward(const at::Tensor& grad_kept, const at::Tensor& kept_index, int64_t num_tokens, int64_t num_global) {
  at::Tensor x = grad_kept.contiguous(), index = kept_index.contiguous();
  at::Tensor grad = at::zeros({x.size(0), num_global + num_tokens, x.size(2)}, x.options());
  Bytes from(x), to(grad);
  each_kept(x.size(0), num_global, index.size(1), index.data_ptr<int64_t>(), [&](int64_t b, int64_t row, int64_t i) {
    std::memcpy(to.at(b, row), from.at(b, i), from.count);
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(vattn, CPU, m) {
  m.impl("select_tokens", forward);
  m.impl("select_tokens_backward", backward);
}

}  // namespace vattn
