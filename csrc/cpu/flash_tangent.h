// The tangent of attention, from tangents q', k', v' of its inputs, with the tiles and itineraries of flash.h:
//
//     s' = scale * (q' k^T + q k'^T),   lse' = sum of p * s' over keys,   out' = p v' + (p * s') v - lse' * out
//
// In a tile:  O' += P V',  O' += (P * S') V.
#pragma once

#include "flash.h"

namespace vattn {
namespace VATTN_ISA {

// Of the tangent: as many queries as share a load of the keys and their tangents, and one tile of those.
struct TangentWorkspace {
  int64_t ld, size;
  float *query, *query_tangent, *out_tangent, *lse, *lse_tangent;  // of all queries; tangents of lse lane by lane
  float *rows, *key_panel, *key_tangent_panel, *value, *value_tangent;  // rows: of keys, then of out
  float *weights, *score_tangents;                                      // of TILE queries
  uint32_t *query_tokens, *key_tokens;

  TangentWorkspace(int64_t head_dim, int64_t panels, float* base) : ld(round_up(head_dim, VL)) {
    const int64_t queries = panels * TILE;
    Pieces p{base};
    for (float** piece : {&query, &query_tangent, &out_tangent}) *piece = p.take(queries * ld);
    lse = p.take(queries);
    lse_tangent = p.take(queries * VL);
    for (float** piece : {&rows, &key_panel, &key_tangent_panel, &value, &value_tangent}) *piece = p.take(TILE * ld);
    for (float** piece : {&weights, &score_tangents}) *piece = p.take(TILE * TILE);
    query_tokens = (uint32_t*)p.take(queries);
    key_tokens = (uint32_t*)p.take(TILE);
    size = p.used;
  }
};

// Scores and their tangents, a row of either for one query, become weights and the products of both, which are returned
// summed over the tile, lane by lane. Dropout leaves those sums, which are the tangent of lse, as they are.
VATTN_INLINE Vec softmax_tangent(float* weights, float* tangents, int64_t columns, float lse, const Dropout* dropout,
                                 uint32_t query_token, const uint32_t* key_tokens) {
  if (lse == -INFINITE) return zero(weights, columns), zero(tangents, columns), Vec{};  // no keys, whatever its tangent
  const auto [shift, rest] = Lse2(lse);
  uint32_t times = 0, add = 0;
  if (dropout) dropout->query(query_token, times, add);
  Vec sum{};
  for (int64_t j = 0; j < columns; j += VL) {
    Vec p = exp2(load(weights + j) - shift - rest), product = p * load(tangents + j);
    sum += product;
    if (dropout) {
      Vec factor = dropout->factors(load(key_tokens + j), times, add);
      p *= factor;
      product *= factor;
    }
    store(weights + j, p);
    store(tangents + j, product);
  }
  return sum;
}

// The tangents of out and lse from those of the inputs: five products, of which two are for the tangents of scores.
template <class Itinerary>
bool tangent(const Itinerary& it, int64_t first, int64_t count, float* workspace) {
  const int64_t D = it.head_dim;
  const TangentWorkspace w(D, (count + TILE - 1) / TILE, workspace);
  const int64_t ld = w.ld;

  it.load_queries(it.a.query, first, count, w.query, ld, it.scale * LOG2E);
  it.load_queries(it.a.query_tangent, first, count, w.query_tangent, ld, it.scale);
  it.load_numbers(it.a.lse, first, count, w.lse);
  if (it.dropout) number_queries(it, first, count, w.query_tokens);
  zero(w.lse_tangent, count * VL);
  if (it.keys == 0) zero(w.out_tangent, count * ld);

  for (int64_t k0 = 0; k0 < it.keys; k0 += TILE) {
    const int64_t keys = least(TILE, it.keys - k0), columns = round_up(keys, VL);
    it.load_keys(it.a.key, k0, keys, w.rows, ld, 1);
    zero(w.rows + keys * ld, (columns - keys) * ld);
    transpose(w.key_panel, TILE, w.rows, ld, columns, ld);
    it.load_keys(it.a.key_tangent, k0, keys, w.rows, ld, LN2);  // the queries carry scale * log2(e): scale is left
    transpose(w.key_tangent_panel, TILE, w.rows, ld, columns, ld);
    it.load_keys(it.a.value, k0, keys, w.value, ld, 1);
    it.load_keys(it.a.value_tangent, k0, keys, w.value_tangent, ld, 1);
    if (it.dropout) number_keys(it, k0, keys, w.key_tokens);
    typename Itinerary::Tile tile;
    if constexpr (Itinerary::ADJUSTS) it.set_keys(tile, k0, keys);

    for (int64_t q0 = 0; q0 < count; q0 += TILE) {
      const int64_t queries = least(TILE, count - q0);
      const Matrix query{w.query + q0 * ld, ld, 1}, query_tangent{w.query_tangent + q0 * ld, ld, 1};
      multiply(false, queries, columns, D, query, w.key_panel, TILE, w.weights, TILE);
      multiply(false, queries, columns, D, query_tangent, w.key_panel, TILE, w.score_tangents, TILE);
      multiply(true, queries, columns, D, query, w.key_tangent_panel, TILE, w.score_tangents, TILE);
      if constexpr (Itinerary::ADJUSTS) {
        it.adjust_scores(tile, first + q0, queries, w.weights);
        it.adjust_tangents(tile, first + q0, queries, w.score_tangents);
      }
      for (int64_t q = 0; q < queries; ++q) {
        float *weights = w.weights + q * TILE, *lse_tangent = w.lse_tangent + (q0 + q) * VL;
        float* tangents = w.score_tangents + q * TILE;
        for (int64_t j = keys; j < columns; ++j) weights[j] = -INFINITE, tangents[j] = 0;
        Vec sum = softmax_tangent(weights, tangents, columns, w.lse[q0 + q], it.dropout,
                                  w.query_tokens[q0 + q], w.key_tokens);
        store(lse_tangent, load(lse_tangent) + sum);
      }
      float* out_tangent = w.out_tangent + q0 * ld;
      multiply(k0 > 0, queries, ld, keys, {w.weights, TILE, 1}, w.value_tangent, ld, out_tangent, ld);
      multiply(true, queries, ld, keys, {w.score_tangents, TILE, 1}, w.value, ld, out_tangent, ld);
    }
  }

  for (int64_t q = 0; q < count; ++q) w.lse_tangent[q] = total(load(w.lse_tangent + q * VL));
  for (int64_t q0 = 0; q0 < count; q0 += TILE) {
    const int64_t queries = least(TILE, count - q0);
    it.load_outputs(it.a.out, first + q0, queries, w.rows, ld, 1);
    for (int64_t q = 0; q < queries; ++q)
      for (int64_t d = 0; d < ld; d += VL) {
        float* out_tangent = w.out_tangent + (q0 + q) * ld + d;
        store(out_tangent, load(out_tangent) - w.lse_tangent[q0 + q] * load(w.rows + q * ld + d));
      }
  }
  it.store_outputs(it.a.out_tangent, first, count, w.out_tangent, ld, 1);
  it.store_numbers(it.a.lse_tangent, first, count, w.lse_tangent);
  // A tangent of lse that is not finite leaves no finite number in its row.
  return shares_tiles(it) && !all_finite(w.out_tangent, count * ld);
}

}  // namespace VATTN_ISA
}  // namespace vattn
