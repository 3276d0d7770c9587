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
      : Base(a, b, h, queries), keys_across(a.positions, b) {}

  void adjust_scores(int64_t first, int64_t count, int64_t k0, int64_t keys, float* scores) const {
    if (!a.positions.table && !a.positions.causal) return;
    if (k0 != key_tile) {  // the same for all tiles of queries
      self().key_tokens(k0, keys, key_rows);
      if (a.positions.table) keys_across.set(key_rows, keys);
      key_tile = k0;
    }
    this->query_tokens(first, count, query_rows);
    if (a.positions.table) keys_across.add(of_head(a.positions.table), scores, query_rows, count);
    if (a.positions.causal) forbid(query_rows, count, key_rows, keys, scores);
  }
  // Of the tile that adjust_scores has seen last.
  void adjust_tangents(int64_t, int64_t count, int64_t, int64_t, float* tangents) const {
    if (a.positions.table_tangent) keys_across.add(of_head(a.positions.table_tangent), tangents, query_rows, count);
  }

 protected:
  // Adds the gradients of the tile that adjust_scores has seen last to those of a table.
  void accumulate_bias(float* table, int64_t count, const float* grads) const {
    keys_across.accumulate(table, grads, query_rows, count);
  }

 private:
  mutable BiasTile keys_across;
  mutable uint32_t query_rows[TILE], key_rows[TILE];
  mutable int64_t key_tile = -1;

  const float* of_head(const float* table) const { return table + h * a.positions.table_head; }

  const Self& self() const { return static_cast<const Self&>(*this); }

  // No query reads a later key, unless one of them is global.
  void forbid(const uint32_t* query, int64_t queries, const uint32_t* key, int64_t keys, float* scores) const {
    const int64_t G = a.positions.G;
    const int32_t* positions = a.positions.causal + b * a.positions.causal_batch;
    int32_t place[TILE];
    for (int64_t j = 0; j < keys; ++j) place[j] = key[j] < G ? -1 : positions[key[j] - G];
    for (int64_t i = 0; i < queries; ++i) {
      if (query[i] < G) continue;
      int32_t here = positions[query[i] - G];
      for (int64_t j = 0; j < keys; ++j)
        if (place[j] > here) scores[i * TILE + j] = -INFINITE;
    }
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
