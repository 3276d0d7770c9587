// What itineraries share: a batch and head of an operator's tensors, and its dropout.
#pragma once

#include "work.h"

namespace vattn {
namespace VATTN_ISA {

template <class Args>
struct Itinerary {
  static constexpr bool ADJUSTS = false, HAS_VALUES = true, SHARES_KEYS = false, SHARES_TILES = false;
  struct Tile {};
  const Args& a;
  const int64_t b, h, head_dim;
  const float scale;
  const Dropout weights_dropout;
  const Dropout* const dropout;

  Itinerary(const Args& a, int64_t b, int64_t h)
      : a(a), b(b), h(h), head_dim(a.D), scale(a.scale), weights_dropout(a.dropout_p, a.seed, a.numbers, b * a.H + h),
        dropout(a.dropout_p > 0 ? &weights_dropout : nullptr) {}
  Itinerary(const Itinerary&) = delete;  // `dropout` points into this object

  template <class U>
  U* at(const Strided& x, int64_t token) const {
    return (U*)x.data + b * x.batch + h * x.head + token * x.inner;
  }
};

// Queries that are consecutive tokens of (B, H, Lq, D), from `query_begin` on, and keys that are tokens of
// (B, H, Lk, D); T is the dtype of rows. Where `Args` may have an order of tokens, all of these are places in it.
template <class T, class Args>
struct TokenItinerary : Itinerary<Args> {
  static constexpr bool MAY_HAVE_ORDER = requires(const Args& args) { args.tokens; };
  using Itinerary<Args>::a, Itinerary<Args>::b, Itinerary<Args>::h, Itinerary<Args>::head_dim;
  int64_t queries, query_begin = 0;

  TokenItinerary(const Args& a, int64_t b, int64_t h, int64_t queries) : Itinerary<Args>(a, b, h), queries(queries) {}

  // The token at each place; null where that is the place.
  VATTN_INLINE const int32_t* order() const {
    if constexpr (MAY_HAVE_ORDER) return a.tokens;
    return nullptr;
  }
  VATTN_INLINE int64_t token(int64_t place) const { return order() ? order()[place] : place; }

  // Calls f(i, its row, the row `ahead` of it) for `count` places from `first` on.
  template <class U, class F>
  VATTN_INLINE void each_row(const Strided& x, int64_t first, int64_t count, int64_t ahead, F f) const {
    const int32_t* const tokens = order();  // asked once
    for (int64_t i = 0; i < count; ++i) {
      U* row = this->template at<U>(x, tokens ? tokens[first + i] : first + i);
      f(i, row, tokens ? this->template at<U>(x, tokens[least(first + i + ahead, a.Lq - 1)]) : row + ahead * x.inner);
    }
  }

  // Rows that are `ahead` of them are fetched.
  template <class Row>
  void load_rows(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times,
                 int64_t ahead = AHEAD) const {
    each_row<const T>(x, first, count, ahead, [&](int64_t i, const T* row, const T* next) {
      zero_end(rows + i * ld, ld);
      prefetch(next, head_dim);
      copy(rows + i * ld, row, head_dim, times);
    });
  }
  template <class U>
  void store_rows(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    each_row<U>(x, first, count, AHEAD, [&](int64_t i, U* row, U* next) {
      prefetch_to_write(next, head_dim);
      copy(row, rows + i * ld, head_dim, times);
    });
  }
  // Into part `part` of several, each float and `step` behind the one before; if it is the only one, of dtype T.
  void store_part(Strided x, int64_t parts, int64_t part, int64_t step, int64_t first, int64_t count, const float* rows,
                  int64_t ld, float times) const {
    if (parts == 1) return store_rows<T>(x, first, count, rows, ld, times);
    x.data = (float*)x.data + part * step;
    store_rows<float>(x, first, count, rows, ld, times);
  }

  template <class Row>
  void load_queries(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    load_rows(x, query_begin + first, count, rows, ld, times);
  }
  void store_queries(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_rows<T>(x, query_begin + first, count, rows, ld, times);
  }
  template <class Row>
  void load_outputs(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    load_queries(x, first, count, rows, ld, times);
  }
  void store_outputs(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_queries(x, first, count, rows, ld, times);
  }

  // Numbers lie in (B, H, Lq).
  float* number(float* x, int64_t query) const { return x + (b * a.H + h) * a.Lq + token(query_begin + query); }
  void load_numbers(float* x, int64_t first, int64_t count, float* to) const {
    if (!order()) return copy(to, number(x, first), count);
    for (int64_t i = 0; i < count; ++i) to[i] = *number(x, first + i);
  }
  void store_numbers(float* x, int64_t first, int64_t count, const float* from) const {
    if (!order()) return copy(number(x, first), from, count);
    for (int64_t i = 0; i < count; ++i) *number(x, first + i) = from[i];
  }

  void query_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    for (int64_t i = 0; i < count; ++i) tokens[i] = (uint32_t)token(query_begin + first + i);
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
