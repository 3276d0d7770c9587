// Leap attention's itinerary: the rows of a leap group, gathered where they lie.
//
// Row r of a group with first frame `base` is token r % N of frame base + r / N * leap. With `fold` channels shifted,
// an output row or its tangent is written, and its gradient read, in three pieces at frames t - 1, t + 1 and t.
#pragma once

#include "itinerary.h"

namespace vattn {
namespace VATTN_ISA {

// Writes (or, turned around, reads) a row that the periodic shift tears apart: piece(frame or -1, channel, count).
template <class Piece>
VATTN_INLINE void shifted_pieces(int64_t t, int64_t T, int64_t fold, int64_t D, Piece piece) {
  int64_t second = least(2 * fold, D);
  if (fold > 0) piece(t - 1, 0, fold);
  if (second > fold) piece(t + 1 < T ? t + 1 : -1, fold, second - fold);
  if (D > second) piece(t, second, D - second);
}

template <class T>
struct LeapGroup : Itinerary<LeapAttention> {
  int64_t base, queries, keys;

  // `index` counts groups with the heads innermost: neighbours read the same pages.
  LeapGroup(const LeapAttention& a, int64_t index) : Itinerary(a, index / a.H / a.groups(), index % a.H) {
    int64_t group = index / a.H % a.groups();
    base = group / a.leap * a.leap * a.group_size + group % a.leap;
    queries = keys = least(a.group_size, (a.T - base + a.leap - 1) / a.leap) * a.N;
  }

  T* at(const Strided& x, int64_t frame, int64_t token) const {
    return Itinerary::at<T>(x, token) + frame * x.middle;
  }

  // Row `row` of a group, and those after it: divides once, not per row.
  struct Cursor {
    const LeapGroup& group;
    int64_t frame, token;

    Cursor(const LeapGroup& group, int64_t row)
        : group(group), frame(group.base + row / group.a.N * group.a.leap), token(row % group.a.N) {}
    void operator++() {
      if (++token == group.a.N) token = 0, frame += group.a.leap;
    }
  };
  // Calls f(frame, token, row of the tile) for `count` rows from `first` on.
  template <class F>
  VATTN_INLINE void each(int64_t first, int64_t count, F f) const {
    Cursor row(*this, first);
    for (int64_t i = 0; i < count; ++i, ++row) f(row.frame, row.token, i);
  }
  // Likewise, and fetches (frame, token) of rows AHEAD of them.
  template <class Fetch, class F>
  VATTN_INLINE void each_fetching(int64_t first, int64_t count, Fetch fetch, F f) const {
    Cursor row(*this, first), later(*this, least(first + AHEAD, queries));
    const int64_t fetched = least(count, queries - first - AHEAD);
    for (int64_t i = 0; i < count; ++i, ++row) {
      if (i < fetched) fetch(later.frame, later.token), ++later;
      f(row.frame, row.token, i);
    }
  }

  template <class Row>
  void load_keys(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    auto fetch = [&](int64_t t, int64_t n) { prefetch(at(x, t, n), head_dim); };
    each_fetching(first, count, fetch, [&](int64_t t, int64_t n, int64_t i) {
      zero_end(rows + i * ld, ld);
      copy(rows + i * ld, at(x, t, n), head_dim, times);
    });
  }
  void store_keys(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    auto fetch = [&](int64_t t, int64_t n) { prefetch_to_write(at(x, t, n), head_dim); };
    each_fetching(first, count, fetch,
         [&](int64_t t, int64_t n, int64_t i) { copy(at(x, t, n), rows + i * ld, head_dim, times); });
  }
  template <class Row>
  void load_queries(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    load_keys(x, first, count, rows, ld, times);
  }
  void store_queries(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_keys(x, first, count, rows, ld, times);
  }

  // Outputs are where the shift has put them, and so are their gradients: the product of both is what it was before.
  template <class Row>
  void load_outputs(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float) const {
    auto fetch = [&](int64_t t, int64_t n) {
      shifted_pieces(t, a.T, a.fold, head_dim, [&](int64_t from, int64_t channel, int64_t channels) {
        if (from >= 0) prefetch(at(x, from, n) + channel, channels);
      });
    };
    each_fetching(first, count, fetch, [&](int64_t t, int64_t n, int64_t i) {
      Row* row = rows + i * ld;
      zero_end(row, ld);
      shifted_pieces(t, a.T, a.fold, head_dim, [&](int64_t from, int64_t channel, int64_t channels) {
        if (from < 0) return zero(row + channel, channels);
        copy(row + channel, at(x, from, n) + channel, channels);
      });
    });
  }
  void store_outputs(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float) const {
    auto fetch = [&](int64_t t, int64_t n) {
      shifted_pieces(t, a.T, a.fold, head_dim, [&](int64_t to, int64_t channel, int64_t channels) {
        if (to >= 0) prefetch_to_write(at(x, to, n) + channel, channels);
      });
    };
    each_fetching(first, count, fetch, [&](int64_t t, int64_t n, int64_t i) {
      const float* row = rows + i * ld;
      shifted_pieces(t, a.T, a.fold, head_dim, [&](int64_t to, int64_t channel, int64_t channels) {
        if (to >= 0) copy(at(x, to, n) + channel, row + channel, channels);
      });
      // What no frame gives: from beyond the last one, and from before the first.
      if (t == a.T - 1) zero(at(x, t, n), a.fold);
      if (t == 0) zero(at(x, t, n) + a.fold, least(a.fold, head_dim - a.fold));
    });
  }

  // Numbers lie in (B, H, T, N).
  float& number(float* x, int64_t t, int64_t n) const { return x[((b * a.H + h) * a.T + t) * a.N + n]; }
  void load_numbers(float* x, int64_t first, int64_t count, float* to) const {
    each(first, count, [&](int64_t t, int64_t n, int64_t i) { to[i] = number(x, t, n); });
  }
  void store_numbers(float* x, int64_t first, int64_t count, const float* from) const {
    each(first, count, [&](int64_t t, int64_t n, int64_t i) { number(x, t, n) = from[i]; });
  }

  void query_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    each(first, count, [&](int64_t t, int64_t n, int64_t i) { tokens[i] = (uint32_t)(t * a.N + n); });
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const { query_tokens(first, count, tokens); }
};

}  // namespace VATTN_ISA
}  // namespace vattn
