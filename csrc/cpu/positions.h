// Itineraries whose scores depend on where tokens are: a bias looked up for each pair, and causality.
#pragma once

#include "itinerary.h"
#include "position_bias.h"

namespace vattn {
namespace VATTN_ISA {

// `Self` numbers its keys as it does its queries, global tokens first: key_tokens.
template <class T, class Args, class Self>
struct PositionedItinerary : TokenItinerary<T, Args> {
  static constexpr bool ADJUSTS = true;
  using Base = TokenItinerary<T, Args>;
  using Base::a, Base::b, Base::h;

  PositionedItinerary(const Args& a, int64_t b, int64_t h, int64_t queries)
      : Base(a, b, h, queries), queries_across(a.positions, b, h), keys_across(a.positions, b, h) {}

  // A tile of scores has a row of TILE for each token down its side: here keys.
  void adjust_scores(int64_t first, int64_t count, int64_t k0, int64_t keys, float* scores) const {
    if (!a.positions.table && !a.positions.causal) return;
    self().key_tokens(k0, keys, key_rows);
    if (first != query_tile) {  // the same for all tiles of keys, but where panels alternate
      this->query_tokens(first, count, query_rows);
      if (a.positions.table) queries_across.set(query_rows, count);
      query_tile = first;
    }
    if (a.positions.table)
      for (int64_t k = 0; k < keys; ++k) queries_across.add(scores + k * TILE, key_rows[k]);
    if (a.positions.causal) forbid<true>(query_rows, count, key_rows, keys, scores);
  }
  // And here queries.
  void adjust_weights(int64_t first, int64_t count, int64_t k0, int64_t keys, float* weights) const {
    if (!a.positions.reversed && !a.positions.causal) return;
    self().key_tokens(k0, keys, key_rows);
    this->query_tokens(first, count, query_rows);
    if (a.positions.reversed) {
      keys_across.set(key_rows, keys);
      for (int64_t q = 0; q < count; ++q) keys_across.add(weights + q * TILE, query_rows[q]);
    }
    if (a.positions.causal) forbid<false>(key_rows, keys, query_rows, count, weights);
  }

 protected:
  // Adds the gradients of the tile that adjust_weights has seen last to those of a table.
  void accumulate_bias(float* table, int64_t count, const float* grads) const {
    for (int64_t q = 0; q < count; ++q) keys_across.accumulate(table, grads + q * TILE, query_rows[q]);
  }

 private:
  mutable BiasTile<true> queries_across;  // forward
  mutable BiasTile<false> keys_across;    // backward
  mutable uint32_t query_rows[TILE], key_rows[TILE];
  mutable int64_t query_tile = -1;

  const Self& self() const { return static_cast<const Self&>(*this); }

  // No query reads a later key, unless one of them is global.
  template <bool QUERIES_ACROSS>
  void forbid(const uint32_t* across, int64_t columns, const uint32_t* side, int64_t rows, float* tile) const {
    const int64_t G = a.positions.G;
    const int32_t* positions = a.positions.causal + b * a.positions.causal_batch;
    int32_t place[TILE];
    for (int64_t j = 0; j < columns; ++j) place[j] = across[j] < G ? -1 : positions[across[j] - G];
    for (int64_t i = 0; i < rows; ++i) {
      if (side[i] < G) continue;
      int32_t here = positions[side[i] - G];
      for (int64_t j = 0; j < columns; ++j) {
        bool later = place[j] >= 0 && (QUERIES_ACROSS ? here > place[j] : place[j] > here);
        if (later) tile[i * TILE + j] = -INFINITE;
      }
    }
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
