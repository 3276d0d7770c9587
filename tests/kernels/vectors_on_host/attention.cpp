// Checks leap attention, forward and backward, as it is compiled for the processor at hand without any instruction set
// of its own: against the formula, in double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define VATTN_ISA tested
#define VATTN_VECTOR_BYTES 16
#include "leap_attention.h"

using namespace vattn;
using namespace vattn::tested;

// Numbers as T holds them.
template <class T>
struct Tensor {
  std::vector<T> rows;
  explicit Tensor(int64_t count) : rows(count) {}

  double operator[](int64_t i) const {
    T padded[VL] = {rows[i]};
    return tested::load(padded)[0];
  }
  void fill(uint32_t seed) {
    for (T& row : rows) {
      seed = seed * 1664525 + 1013904223;
      const float x = (float)(int32_t)seed * 0x1p-30f;
      copy(&row, &x, 1);
    }
  }
};

template <class T>
static double check(int64_t frames, int64_t tokens, int64_t D, int64_t leap, int64_t group_size) {
  const int64_t count = frames * tokens;
  Tensor<T> q(count * D), k(count * D), v(count * D), out(count * D), grad(count * D);
  Tensor<T> dq(count * D), dk(count * D), dv(count * D);
  std::vector<float> lse(count), delta(count), workspace(1 << 22);
  uint32_t seed = 0;
  for (Tensor<T>* x : {&q, &k, &v, &grad}) x->fill(++seed);

  LeapAttention a{};
  a.dtype = std::is_same_v<T, float> ? Dtype::Float32 : std::is_same_v<T, Float16> ? Dtype::Float16 : Dtype::BFloat16;
  a.B = a.H = 1, a.D = D, a.T = frames, a.N = tokens, a.leap = leap, a.group_size = group_size;
  a.scale = 0.3f, a.panels = 2, a.chunk = 2 * TILE;
  a.components = a.groups(), a.max_queries = a.max_keys = group_size * tokens;
  auto place = [&](Tensor<T>& x) { return Strided{x.rows.data(), 0, 0, 0, tokens * D, D}; };
  a.query = place(q), a.key = place(k), a.value = place(v), a.out = place(out), a.grad_out = place(grad);
  a.grad_query = place(dq), a.grad_key = place(dk), a.grad_value = place(dv);
  a.lse = lse.data(), a.delta = delta.data();
  const int64_t panels = (a.max_queries + a.panels * TILE - 1) / (a.panels * TILE);
  forward_items<LeapGroup<T>>(a, 0, a.components * panels, workspace.data());
  backward_items<LeapGroup<T>>(a, 0, a.components, workspace.data());

  double worst = 0;
  auto compare = [&](const Tensor<T>& found, const std::vector<double>& expected) {
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = std::abs(found[i] - expected[i]) / (1 + std::abs(expected[i]));
      worst = error <= worst ? worst : error;  // NaN, too
    }
  };
  std::vector<double> o(count * D), gq(count * D), gk(count * D), gv(count * D);
  auto group = [&](int64_t row) {
    const int64_t t = row / tokens;
    return t / (leap * group_size) * leap + t % leap;
  };
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> p(count, 0.);
    double sum = 0, mean = 0;
    for (int64_t j = 0; j < count; ++j) {
      if (group(i) != group(j)) continue;
      double score = 0;
      for (int64_t d = 0; d < D; ++d) score += q[i * D + d] * k[j * D + d];
      sum += p[j] = std::exp(a.scale * score);
    }
    for (int64_t j = 0; j < count; ++j)
      for (int64_t d = 0; d < D; ++d) {
        o[i * D + d] += (p[j] /= d ? 1 : sum) * v[j * D + d];
        gv[j * D + d] += p[j] * grad[i * D + d];
      }
    for (int64_t d = 0; d < D; ++d) mean += o[i * D + d] * grad[i * D + d];
    for (int64_t j = 0; j < count; ++j) {
      double dp = 0;
      for (int64_t d = 0; d < D; ++d) dp += grad[i * D + d] * v[j * D + d];
      for (int64_t d = 0; d < D; ++d) {
        gq[i * D + d] += a.scale * p[j] * (dp - mean) * k[j * D + d];
        gk[j * D + d] += a.scale * p[j] * (dp - mean) * q[i * D + d];
      }
    }
    const double error = std::abs(lse[i] - std::log(sum));
    worst = error <= worst ? worst : error;
  }
  compare(out, o), compare(dq, gq), compare(dk, gk), compare(dv, gv);
  return worst;
}

int main() {
  int failures = 0;
  for (int64_t tokens : {1, 5, 70})
    for (int64_t D : {3, 16, 36}) {
      const double errors[] = {check<float>(6, tokens, D, 2, 3), check<Float16>(6, tokens, D, 2, 3)};
      for (int half = 0; half < 2; ++half)
        if (!(errors[half] < (half ? 4e-3 : 4e-6)))  // gradients begin with an output that is rounded, too
          ++failures, std::printf("%d tokens of %d, 16 bits: %d, error %g\n", (int)tokens, (int)D, half, errors[half]);
    }
  return failures > 0;
}
