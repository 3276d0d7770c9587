// Axial attention's itinerary: a line of the grid, or several short lines, which share a panel.
//
//     row of a component    0 .. line          .. 2 line        ..           lines are numbered through outer and inner
//     token                 of line n          of line n + 1    ..           tokens of other lines are not read
#pragma once

#include "itinerary.h"

namespace vattn {
namespace VATTN_ISA {

template <class T>
struct AxialLine;

template <class T>
struct AxialLines : Itinerary<AxialAttention> {
  static constexpr bool ADJUSTS = true, SHARES_TILES = true;
  struct Tile {
    int64_t first, count;
  };
  int64_t first_line, queries, keys;
  struct Place {
    int64_t b, h, outer, inner;
  };
  Place step;  // to a component that this thread comes to soon

  // `index` counts lines with the heads innermost: neighbours read the same pages.
  AxialLines(const AxialAttention& a, int64_t index) : AxialLines(a, index, place(a, index)) {}
  AxialLines(const AxialAttention& a, int64_t index, Place here)
      : Itinerary(a, here.b, here.h), first_line(here.outer * a.inner + here.inner) {
    queries = keys = least(a.lines, a.outer * a.inner - first_line) * a.line;
    constexpr int64_t SOON = 2;
    Place soon = place(a, least(index + SOON, a.components - 1));
    step = {soon.b - here.b, soon.h - here.h, soon.outer - here.outer, soon.inner - here.inner};
  }
  static Place place(const AxialAttention& a, int64_t index) {
    int64_t groups = (a.outer * a.inner + a.lines - 1) / a.lines, h = index % a.H, rest = index / a.H;
    int64_t line = rest % groups * a.lines;
    return {rest / groups, h, line / a.inner, line % a.inner};
  }

  // Calls f(outer, token of the line, inner, row of the tile) for `count` rows from `first` on.
  template <class F>
  VATTN_INLINE void each(int64_t first, int64_t count, F f) const {
    int64_t line = first_line + first / a.line, token = first % a.line, o = line / a.inner, i = line % a.inner;
    for (int64_t row = 0; row < count; ++row) {
      f(o, token, i, row);
      if (++token < a.line) continue;
      token = 0;
      if (++i == a.inner) i = 0, ++o;
    }
  }

  T* at(const Strided& x, int64_t o, int64_t token, int64_t i) const {
    return (T*)x.data + b * x.batch + h * x.head + o * x.outer + token * x.middle + i * x.inner;
  }
  int64_t token_of(int64_t o, int64_t token, int64_t i) const { return (o * a.line + token) * a.inner + i; }

  void query_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    each(first, count,
         [&](int64_t o, int64_t t, int64_t i, int64_t row) { tokens[row] = (uint32_t)token_of(o, t, i); });
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const { query_tokens(first, count, tokens); }

  // Rows of a line may each lie on a page of their own, which no processor foresees: what a component reads and writes
  // is fetched into the second-level cache some components before.
  int64_t soon(const Strided& x) const {
    return step.b * x.batch + step.h * x.head + step.outer * x.outer + step.inner * x.inner;
  }
  void fetch(const T* row) const {
    constexpr int64_t CACHE_LINE = 64 / sizeof(T);
    for (int64_t d = 0; d < head_dim; d += CACHE_LINE) __builtin_prefetch(row + d, 0, 2);
  }
  template <class Row>
  void load_keys(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    const int64_t ahead = soon(x);
    each(first, count, [&](int64_t o, int64_t t, int64_t i, int64_t row) {
      const T* from = at(x, o, t, i);
      fetch(from + ahead);
      zero_end(rows + row * ld, ld);
      copy(rows + row * ld, from, head_dim, times);
    });
  }
  void store_keys(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    const int64_t ahead = soon(x);
    each(first, count, [&](int64_t o, int64_t t, int64_t i, int64_t row) {
      T* to = at(x, o, t, i);
      fetch(to + ahead);
      copy(to, rows + row * ld, head_dim, times);
    });
  }

  template <class Row>
  void load_queries(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    load_keys(x, first, count, rows, ld, times);
  }
  void store_queries(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_keys(x, first, count, rows, ld, times);
  }
  template <class Row>
  void load_outputs(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    load_keys(x, first, count, rows, ld, times);
  }
  void store_outputs(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    store_keys(x, first, count, rows, ld, times);
  }

  // Numbers lie in (B, H, outer, line, inner): in the order of the tokens.
  float* numbers(float* x) const { return x + (b * a.H + h) * a.outer * a.line * a.inner; }
  void load_numbers(float* x, int64_t first, int64_t count, float* to) const {
    const float* of = numbers(x);
    each(first, count, [&](int64_t o, int64_t t, int64_t i, int64_t row) { to[row] = of[token_of(o, t, i)]; });
  }
  void store_numbers(float* x, int64_t first, int64_t count, const float* from) const {
    float* of = numbers(x);
    each(first, count, [&](int64_t o, int64_t t, int64_t i, int64_t row) { of[token_of(o, t, i)] = from[row]; });
  }

  // Lines that share a panel do not see each other.
  void set_keys(Tile& tile, int64_t first, int64_t count) const { tile = {first, count}; }
  void adjust_scores(const Tile& tile, int64_t first, int64_t count, float* scores) const {
    if (a.lines == 1) return;
    for (int64_t q = 0; q < count; ++q) {
      int64_t begin = (first + q) / a.line * a.line - tile.first, end = begin + a.line;
      for (int64_t j = 0; j < tile.count; ++j)
        if (j < begin || j >= end) scores[q * TILE + j] = -INFINITE;
    }
  }
  void adjust_grads(const Tile&, int64_t, int64_t, const float*) const {}
  void adjust_tangents(const Tile&, int64_t, int64_t, float*) const {}

  bool shares_tiles() const { return a.lines > 1; }
  template <class F>
  static void each_part(const AxialAttention& a, int64_t index, int64_t, int64_t first, int64_t count, F f) {
    for (int64_t row = first, rows; row < first + count; row += rows) {
      rows = least(first + count, (row / a.line + 1) * a.line) - row;
      f(AxialLine<T>(a, index, row / a.line), row, rows);
    }
  }
};

// A line among those of its panel: the others have no keys.
template <class T>
struct AxialLine : AxialLines<T> {
  static constexpr bool SHARES_TILES = false;
  using Base = AxialLines<T>;
  using Base::a, typename Base::Tile;
  int64_t line;

  AxialLine(const AxialAttention& a, int64_t index, int64_t line) : Base(a, index), line(line) {}

  bool reads(int64_t row) const { return row / a.line == line; }
  template <class Row>
  void load_keys(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    Base::load_keys(x, first, count, rows, ld, times);
    for (int64_t i = 0; i < count; ++i)
      if (!reads(first + i)) zero(rows + i * ld, ld);
  }
  void store_keys(const Strided& x, int64_t first, int64_t count, const float* rows, int64_t ld, float times) const {
    for (int64_t i = 0; i < count; ++i)
      if (reads(first + i)) Base::store_keys(x, first + i, 1, rows + i * ld, ld, times);
  }
  void adjust_tangents(const Tile& tile, int64_t, int64_t count, float* tangents) const {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t j = 0; j < tile.count; ++j)
        if (!reads(tile.first + j)) tangents[q * TILE + j] = 0;
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
