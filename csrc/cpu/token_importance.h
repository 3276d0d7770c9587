// How much attention tokens get: the softmax probabilities of a key, summed over queries and heads.
//
// Two passes over the scores, neither of which keeps them: the first gives each query's maximum m and sum of 2^(s - m),
// the second adds 2^(s - m) / sum to the keys. With an lse that is given, which says as much, there is only the second.
#pragma once

#include "positions.h"

namespace vattn {
namespace VATTN_ISA {

template <class T>
struct ImportanceKeys : PositionedItinerary<T, TokenImportance, ImportanceKeys<T>> {
  static constexpr bool HAS_VALUES = false;
  using Base = PositionedItinerary<T, TokenImportance, ImportanceKeys<T>>;
  using Base::a;
  int64_t keys;

  ImportanceKeys(const TokenImportance& a, int64_t index)
      : Base(a, index / a.H, index % a.H, a.Lq), keys(a.key_lengths ? a.key_lengths[index / a.H] : a.max_keys) {}

  template <class Row>
  void load_keys(const Strided& x, int64_t first, int64_t count, Row* rows, int64_t ld, float times) const {
    this->load_rows(x, first, count, rows, ld, times);
  }
  void key_tokens(int64_t first, int64_t count, uint32_t* tokens) const {
    for (int64_t i = 0; i < count; ++i) tokens[i] = (uint32_t)(first + i);
  }
};

// Adds to the sums of a tile of keys the weights that all queries give them: doubles, since there are many.
template <class Itinerary>
void add_weights(const Itinerary& it, int64_t k0, int64_t keys, const BackwardWorkspace& w, double* sums) {
  const int64_t ld = w.ld, columns = round_up(keys, VL);
  float maximum[TILE], sum[TILE];
  it.load_keys(it.a.key, k0, keys, w.keys, ld, 1);
  zero(w.keys + keys * ld, (columns - keys) * ld);
  transpose(w.key_panel, TILE, w.keys, ld, columns, ld);
  typename Itinerary::Tile tile;
  if constexpr (Itinerary::ADJUSTS) it.set_keys(tile, k0, keys);
  for (int64_t first = 0; first < it.queries; first += TILE) {
    int64_t count = least(TILE, it.queries - first);
    it.load_queries(it.a.query, first, count, w.query, ld, it.scale * LOG2E);
    if (it.a.lse) {
      it.load_numbers(it.a.lse, first, count, maximum);
      for (int64_t q = 0; q < count; ++q) {
        const auto [shift, rest] = Lse2(maximum[q]);
        maximum[q] = shift;
        sum[q] = shift == -INFINITE ? 0 : shift == INFINITE ? 1 : exp2(splat(rest))[0];
      }
    } else {
      it.load_numbers(it.a.maximum, first, count, maximum);
      it.load_numbers(it.a.sum, first, count, sum);
    }
    multiply(false, count, columns, it.head_dim, {w.query, ld, 1}, w.key_panel, TILE, w.weights, TILE);
    if constexpr (Itinerary::ADJUSTS) it.adjust_scores(tile, first, count, w.weights);
    for (int64_t q = 0; q < count; ++q) {
      if (sum[q] == 0) continue;
      float* weights = w.weights + q * TILE;
      for (int64_t j = 0; j < columns; j += VL) store(weights + j, exp2(load(weights + j) - maximum[q]) / sum[q]);
      for (int64_t j = 0; j < columns; ++j) sums[j] += weights[j];
    }
  }
}

// Items count (b, tile of keys). Heads are summed in one order, whatever the threads; what no sample reads stays 0.
template <class T>
void importance_items(const TokenImportance& a, int64_t begin, int64_t end, float* workspace) {
  const BackwardWorkspace w(a.D, TILE, TILE, 0, workspace);
  const int64_t tiles = (a.max_keys + TILE - 1) / TILE;
  for (int64_t item = begin; item < end; ++item) {
    int64_t b = item / tiles, first = item % tiles * TILE;
    int64_t keys = least(TILE, (a.key_lengths ? a.key_lengths[b] : a.max_keys) - first);
    double sums[TILE] = {};
    for (int64_t h = 0; h < a.H && keys > 0; ++h)
      add_weights(ImportanceKeys<T>(a, b * a.H + h), first, keys, w, sums);
    float* importance = a.importance + b * a.max_keys + first;
    for (int64_t i = 0; i < keys; ++i) importance[i] = (float)(sums[i] / (double)(a.H * a.Lq));
  }
}

}  // namespace VATTN_ISA
}  // namespace vattn
