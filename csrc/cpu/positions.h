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
  using Base::a, Base::b, Base::h, Base::TokenItinerary;
  struct Tile {
    int64_t first, count;
    uint32_t keys[TILE];
    BiasTile bias;
  };

  void set_keys(Tile& tile, int64_t first, int64_t count) const {
    tile.first = first, tile.count = count;
    if (!a.positions.table && !a.positions.causal) return;
    static_cast<const Self*>(this)->key_tokens(first, count, tile.keys);
    if (a.positions.table) tile.bias.set(a.positions, b, tile.keys, count);
  }
  void adjust_scores(const Tile& tile, int64_t first, int64_t count, float* scores) const {
    if (!a.positions.table && !a.positions.causal) return;
    uint32_t queries[TILE];
    this->query_tokens(first, count, queries);
    if (a.positions.table) tile.bias.add(of_head(a.positions.table), scores, queries, count);
    if (a.positions.causal) forbid(queries, count, tile.keys, tile.count, scores);
  }
  void adjust_tangents(const Tile& tile, int64_t first, int64_t count, float* tangents) const {
    if (!a.positions.table_tangent) return;
    uint32_t queries[TILE];
    this->query_tokens(first, count, queries);
    tile.bias.add(of_head(a.positions.table_tangent), tangents, queries, count);
  }

 protected:
  // Whether no causality forbids a query a key.
  bool may_read(int64_t query, int64_t key) const {
    const int64_t G = a.positions.G;
    const int32_t* positions = a.positions.causal + b * a.positions.causal_batch;
    return query < G || key < G || positions[key - G] <= positions[query - G];
  }
  // Adds the gradients of a tile of scores to those of a table.
  void accumulate_bias(const Tile& tile, float* table, int64_t first, int64_t count, const float* grads) const {
    uint32_t queries[TILE];
    this->query_tokens(first, count, queries);
    tile.bias.accumulate(table, grads, queries, count);
  }

 private:
  const float* of_head(const float* table) const { return table + h * a.positions.table_head; }

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
