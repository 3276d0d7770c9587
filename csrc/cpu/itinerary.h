// What itineraries share: a batch and head of an operator's tensors, and its dropout.
#pragma once

#include "work.h"

namespace vattn {
namespace VATTN_ISA {

template <class Args>
struct Itinerary {
  static constexpr bool ADJUSTS = false, HAS_VALUES = true;
  const Args& a;
  const int64_t b, h, head_dim;
  const float scale;
  const Dropout weights_dropout;
  const Dropout* const dropout;

  Itinerary(const Args& a, int64_t b, int64_t h)
      : a(a), b(b), h(h), head_dim(a.D), scale(a.scale), weights_dropout(a.dropout_p, a.seed, b * a.H + h),
        dropout(a.dropout_p > 0 ? &weights_dropout : nullptr) {}
  Itinerary(const Itinerary&) = delete;  // `dropout` points into this object

  template <class U>
  U* at(const Video& x, int64_t token) const {
    return (U*)x.data + b * x.batch + h * x.head + token * x.token;
  }
};

// Queries that are consecutive tokens of (B, H, Lq, D), from `query_begin` on; T is the dtype of rows.
template <class T, class Args>
struct TokenItinerary : Itinerary<Args> {
  using Itinerary<Args>::a, Itinerary<Args>::b, Itinerary<Args>::h, Itinerary<Args>::head_dim;
  int64_t queries, query_begin = 0;

  TokenItinerary(const Args& a, int64_t b, int64_t h, int64_t queries) : Itinerary<Args>(a, b, h), queries(queries) {}

  void load_rows(const Video& x, int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    for (int64_t i = 0; i < count; ++i) {
      const T* row = this->template at<const T>(x, first + i);
      store(rows + i * ld + ld - VL, Vec{});
      prefetch(row + AHEAD * x.token, head_dim);
      copy(rows + i * ld, row, head_dim, times);
    }
  }
  template <class U>
  void store_rows(const Video& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    for (int64_t i = 0; i < count; ++i) copy(this->template at<U>(x, first + i), rows + i * ld, head_dim, times);
  }

  void load_query(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_rows(a.query, query_begin + first, count, rows, ld, times);
  }
  void load_query_tangent(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_rows(a.query_tangent, query_begin + first, count, rows, ld, times);
  }
  void load_out(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_rows(a.out, query_begin + first, count, rows, ld, times);
  }
  void load_grad_out(int64_t first, int64_t count, float* rows, int64_t ld, float times) const {
    load_rows(a.grad_out, query_begin + first, count, rows, ld, times);
  }
  void store_out(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_rows<T>(a.out, query_begin + first, count, rows, ld, times);
  }
  void store_out_tangent(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_rows<T>(a.out_tangent, query_begin + first, count, rows, ld, times);
  }
  void store_grad_query(int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_rows<T>(a.grad_query, query_begin + first, count, rows, ld, times);
  }

  // Row sums lie in (B, H, Lq).
  float* sums(float* of, int64_t first) const { return of + (b * a.H + h) * a.Lq + query_begin + first; }
  void load_lse(int64_t first, int64_t count, float* x) const { copy(x, sums(a.lse, first), count); }
  void store_lse(int64_t first, int64_t count, const float* x) const { copy(sums(a.lse, first), x, count); }
  void store_lse_tangent(int64_t first, int64_t count, const float* x) const {
    copy(sums(a.lse_tangent, first), x, count);
  }
  void load_delta(int64_t first, int64_t count, float* x) const { copy(x, sums(a.delta, first), count); }
  void add_delta(int64_t first, int64_t count, const float* x) const {
    for (int64_t i = 0; i < count; ++i) sums(a.delta, first)[i] += x[i];
  }

  void query_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    for (int64_t i = 0; i < count; ++i) tokens[i] = (uint32_t)(query_begin + first + i);
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
