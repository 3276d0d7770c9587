// The operators that only move and add up rows: periodic shift and merging. Items are rows of the output.
#pragma once

#include "vector.h"

namespace vattn {
namespace VATTN_ISA {

// Items count (b, t, n, h), heads innermost, as the output lies.
template <class T>
void periodic_shift(const PeriodicShift& a, int64_t begin, int64_t end) {
  auto at = [&](const Strided& x, int64_t b, int64_t h, int64_t t, int64_t n) {
    return (T*)x.data + b * x.batch + h * x.head + t * x.middle + n * x.inner;
  };
  int64_t second = least(2 * a.fold, a.D);
  int64_t step = a.transpose ? -1 : 1;
  for (int64_t item = begin; item < end; ++item) {
    int64_t h = item % a.H, n = item / a.H % a.N, t = item / a.H / a.N % a.T, b = item / a.H / a.N / a.T;
    T* out = at(a.out, b, h, t, n);
    auto piece = [&](int64_t from, int64_t channel, int64_t channels) {
      if (from < 0 || from >= a.T)
        zero(out + channel, channels);
      else
        copy(out + channel, at(a.x, b, h, from, n) + channel, channels);
    };
    piece(t + step, 0, a.fold);
    piece(t - step, a.fold, second - a.fold);
    piece(t, second, a.D - second);
  }
}

// Where row i of each of some tensors is: its place on every axis, found once.
template <class T>
struct RowPlace {
  const MergeAttention& a;
  int64_t index[Rows::MAX_AXES];

  RowPlace(const MergeAttention& a, int64_t row) : a(a) {
    for (int64_t axis = a.axes - 1; axis >= 0; --axis) index[axis] = row % a.sizes[axis], row /= a.sizes[axis];
  }
  T* in(const Rows& x) const {
    T* p = (T*)x.data;
    for (int64_t axis = 0; axis < a.axes; ++axis) p += index[axis] * x.strides[axis];
    return p;
  }
};

// A part with an lse of -inf has no keys: whatever else it holds, it has no weight and no gradient. NaN is not the most,
// but of an lse that is NaN, so is the weight.
template <class T>
void merge_forward(const MergeAttention& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  float sum[MergeAttention::MAX_D], part[MergeAttention::MAX_D];
  for (int64_t i = begin; i < end; ++i) {
    RowPlace<T> place(a, i);
    float most = -INFINITE, total = 0;
    for (int64_t p = 0; p < a.parts; ++p) most = a.lses[p][i] > most ? a.lses[p][i] : most;
    zero(sum, D);
    const float shift = most == -INFINITE ? 0 : most;
    for (int64_t p = 0; p < a.parts; ++p) {
      if (a.lses[p][i] == -INFINITE) continue;
      float weight = __builtin_expf(a.lses[p][i] - shift);
      total += weight;
      copy(part, (const T*)place.in(a.outs[p]), D, weight);
      for (int64_t d = 0; d < D; ++d) sum[d] += part[d];
    }
    copy(place.in(a.out), sum, D, total == 0 ? 0 : 1 / total);
    a.lse[i] = total == 0 ? -INFINITE : shift + __builtin_logf(total);
  }
}

// d out_p = w_p g,  d lse_p = w_p (<g, out_p - out> + g_lse),  w_p = exp(lse_p - lse)
template <class T>
void merge_backward(const MergeAttention& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  float grad[MergeAttention::MAX_D], out[MergeAttention::MAX_D], part[MergeAttention::MAX_D];
  for (int64_t i = begin; i < end; ++i) {
    RowPlace<T> place(a, i);
    copy(grad, (const T*)place.in(a.grad_out), D);
    copy(out, (const T*)place.in(a.out), D);
    for (int64_t p = 0; p < a.parts; ++p) {
      if (a.lses[p][i] == -INFINITE) {
        a.grad_lses[p][i] = 0;
        zero(place.in(a.grad_outs[p]), D);
        continue;
      }
      float weight = __builtin_expf(a.lses[p][i] - a.lse[i]);
      copy(part, (const T*)place.in(a.outs[p]), D);
      float dot = a.grad_lse ? a.grad_lse[i] : 0;
      for (int64_t d = 0; d < D; ++d) dot += grad[d] * (part[d] - out[d]);
      a.grad_lses[p][i] = weight * dot;
      copy(place.in(a.grad_outs[p]), grad, D, weight);
    }
  }
}

// lse' = sum w_p lse_p',  out' = sum w_p (out_p' + (lse_p' - lse') out_p),  w_p = exp(lse_p - lse)
template <class T>
void merge_tangent(const MergeAttention& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  float sum[MergeAttention::MAX_D], part[MergeAttention::MAX_D], tangent[MergeAttention::MAX_D];
  for (int64_t i = begin; i < end; ++i) {
    RowPlace<T> place(a, i);
    auto each = [&](auto f) {
      for (int64_t p = 0; p < a.parts; ++p)
        if (a.lses[p][i] != -INFINITE) f(p, __builtin_expf(a.lses[p][i] - a.lse[i]));
    };
    float lse_tangent = 0;
    each([&](int64_t p, float weight) { lse_tangent += weight * a.lse_tangents[p][i]; });
    zero(sum, D);
    each([&](int64_t p, float weight) {
      copy(part, (const T*)place.in(a.outs[p]), D);
      copy(tangent, (const T*)place.in(a.out_tangents[p]), D);
      const float drift = a.lse_tangents[p][i] - lse_tangent;
      for (int64_t d = 0; d < D; ++d) sum[d] += weight * (tangent[d] + drift * part[d]);
    });
    copy(place.in(a.out_tangent), sum, D);
    a.lse_tangent[i] = lse_tangent;
  }
}

}  // namespace VATTN_ISA
}  // namespace vattn
