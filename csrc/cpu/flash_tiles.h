// The core of flash.h for bfloat16 on a processor with matrix tiles: the same equations, itineraries and promises.
//
// Rows stay bfloat16, and so become weights and gradients of scores before they are multiplied; all sums are float32.
// Queries come in strips of 32, and keys in tiles as in flash.h. Forward:
//
//            chunk of keys                    channels
//     D   [ K^T               ]            k [ V              ]
//     q   [ S   (then P)      ]  <- strip  q [ O              ]  <- P V
//
// Backward, a tile of keys meets a span of queries, strip by strip, which gives P, dS and dQ += dS K. What was kept of
// the span then gives the gradients of keys, turned around, since sums over queries read P and dS by rows of B:
//
//     dV^T += dO^T P,   dK^T += Q^T dS
#pragma once

#include "gemm_tiles.h"
#include "work.h"

namespace vattn {
namespace VATTN_ISA {

constexpr int64_t STRIP = DEPTH;      // of queries
constexpr int64_t CHUNK_TILES = 8;    // of keys, forward
constexpr int64_t HELD_PANELS = 16;   // of queries, forward, of the fewest channels
constexpr int64_t SPAN = 8 * STRIP;   // of queries, backward

VATTN_INLINE BFloat16* take_halves(Pieces& p, int64_t count) { return (BFloat16*)p.take((count + 1) / 2); }

// A polynomial of 2^f on [0, 1), relative error 1e-7, times a power of 2; 0 or what else is in `others` where the mask
// is not.
VATTN_INLINE Vec exp2(Mask mask, Vec x, Vec others) {
  constexpr int MINUS_FLOOR = 1;
  const Vec f = (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, MINUS_FLOOR);
  Vec p = splat(1.867130050e-3f);
  p = p * f + 9.017030708e-3f;
  p = p * f + 5.579991266e-2f;
  p = p * f + 2.401644439e-1f;
  p = p * f + 6.931512952e-1f;
  p = p * f + 1.0f;
  return (Vec)_mm512_mask_scalef_ps((__m512)others, mask, (__m512)p, (__m512)x);
}

// Calls f(k, mask of the keys k and on, of the keys k + 16 and on) for all pairs of vectors of keys.
template <class F>
VATTN_INLINE void each_pair(int64_t keys, F f) {
  constexpr Mask ALL = 0xffff;
  int64_t k = 0;
  for (; k + DEPTH <= keys; k += DEPTH) f(k, ALL, ALL);
  if (k == keys) return;
  const uint32_t rest = (1u << (keys - k)) - 1;
  f(k, (Mask)rest, (Mask)(rest >> VL));
}

// Multiplies a strip of queries by a tile of keys, packed as columns from `depth` channels: a row of TILE for each
// query.
VATTN_INLINE void multiply_strip(int64_t queries, int64_t keys, const BFloat16* rows, const BFloat16* columns,
                                 int64_t depth, float* products) {
  multiply(false, (queries + BLOCK - 1) / BLOCK, (keys + BLOCK - 1) / BLOCK, depth / DEPTH,
           {rows, depth, BLOCK * depth, DEPTH}, {columns, BLOCK_SIZE, depth * BLOCK}, products, TILE);
}

// Makes scores of products. Returns the factor that remains, which is not negative: the sign of the scale is
// the query's.
template <class Itinerary>
VATTN_INLINE float adjust(const Itinerary& it, [[maybe_unused]] const typename Itinerary::Tile& tile, int64_t first,
                          int64_t queries, int64_t keys, float* scores) {
  const float times = __builtin_fabsf(it.scale) * LOG2E;
  if constexpr (Itinerary::ADJUSTS) {
    for (int64_t q = 0; q < queries; ++q)
      for (int64_t j = 0; j < keys; j += VL) store(scores + q * TILE + j, times * load(scores + q * TILE + j));
    it.adjust_scores(tile, first, queries, scores);
    return 1;
  }
  return times;
}

// The products of rows with those of others, added to a number for each.
VATTN_INLINE void add_products(const BFloat16* x, const BFloat16* y, int64_t count, int64_t ld, float* sums) {
  for (int64_t i = 0; i < count; ++i) {
    Vec products{};
    for (int64_t d = 0; d < ld; d += VL) products += load(x + i * ld + d) * load(y + i * ld + d);
    sums[i] += total(products);
  }
}

struct TileForwardWorkspace {
  int64_t depth, ld, chunk, held, size;  // channels of rows, of output; keys in a chunk, queries at once
  BFloat16 *query, *rows, *keys, *values, *weights;
  float *out, *sum, *shift, *scores;
  uint32_t *query_tokens, *key_tokens;

  TileForwardWorkspace(int64_t head_dim, int64_t panels, float* base)
      : depth(round_up(head_dim, DEPTH)), ld(round_up(head_dim, BLOCK)), chunk(CHUNK_TILES * TILE),
        held(least(panels, 1 + (HELD_PANELS - 1) * DEPTH / depth) * TILE) {
    Pieces p{base};
    query = take_halves(p, held * depth);
    out = p.take(held * ld);
    sum = p.take(held * VL);
    shift = p.take(held);
    rows = take_halves(p, TILE * depth);
    keys = take_halves(p, chunk * depth);
    values = take_halves(p, chunk * ld);
    scores = p.take(STRIP * TILE);
    weights = take_halves(p, STRIP * TILE);
    query_tokens = (uint32_t*)p.take(held);
    key_tokens = (uint32_t*)p.take(chunk);
    size = p.used;
  }

  template <class Itinerary>
  void load_keys(const Itinerary& it, int64_t first, int64_t count) const {
    for (int64_t k = 0; k < count; k += TILE) {
      const int64_t n = least(TILE, count - k), all = round_up(n, DEPTH);
      it.load_keys(it.a.key, first + k, n, rows, depth, 1);
      zero(rows + n * depth, (all - n) * depth);
      pack_columns(keys + k * depth, rows, depth, all);
      it.load_keys(it.a.value, first + k, n, rows, depth, 1);
      pack_terms(values + k * ld, rows, depth, all, ld);
    }
  }
};

// Never one operation with the difference that follows: a maximum minus itself must be 0, however large.
VATTN_INLINE Vec rounded_product(float times, Vec x) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return (Vec)_mm512_maskz_mul_round_ps(0xffff, (__m512)splat(times), (__m512)x, NEAREST);
}

// Scores of at most 16 queries become weights, in blocks of A that lie two apart, and are added to sums, lane by lane.
// `times` is not negative. All powers of 2 of a query have a shift, which is not always the maximum: it is near enough
// that none is too large for a float. Where it changes, what was gathered before is multiplied by the decay that
// `decayed` gets.
template <bool DROPS, class Decayed>
VATTN_INLINE void online_softmax_block(const float* scores, int64_t queries, int64_t keys, float times, float* shifts,
                                       float* sum, BFloat16* weights, const Dropout* dropout,
                                       const uint32_t* query_tokens, const uint32_t* key_tokens, Decayed decayed) {
  constexpr float NEAR = 8;
  alignas(64) float most[BLOCK * BLOCK], shift[BLOCK];
  Mask grown = 0;
  for (int64_t q = 0; q < queries; ++q) {
    Vec a = splat(-INFINITE), b = a;
    each_pair(keys, [&](int64_t k, Mask low, Mask high) {
      const float* s = scores + q * TILE + k;
      a = (Vec)_mm512_mask_max_ps((__m512)a, low, (__m512)load(s), (__m512)a);
      b = (Vec)_mm512_mask_max_ps((__m512)b, high, (__m512)load(s + VL), (__m512)b);
    });
    a = rounded_product(times, larger(a, b));
    store(most + q * BLOCK, a);
    grown |= _mm512_cmp_ps_mask((__m512)a, (__m512)splat(shifts[q] + NEAR), _CMP_GT_OQ);
  }
  Vec now = load(shifts);
  if (grown) {
    transpose_block(most, BLOCK, most, BLOCK);
    Vec maximum = load(most);
    for (int64_t i = 1; i < BLOCK; ++i) maximum = larger(load(most + i * BLOCK), maximum);
    const Vec old = now;
    grown = _mm512_cmp_ps_mask((__m512)maximum, (__m512)(old + NEAR), _CMP_GT_OQ) & (Mask)((1 << queries) - 1);
    now = (Vec)_mm512_mask_mov_ps((__m512)old, grown, (__m512)maximum);
    store(shifts, now), store(shift, exp2((Mask)0xffff, old - now, Vec{}));
    for (int64_t q = 0; q < queries; ++q)
      if (grown >> q & 1) {
        store(sum + q * VL, load(sum + q * VL) * shift[q]);
        decayed(q, shift[q]);
      }
  }
  store(shift, now == -INFINITE ? Vec{} : now);  // no key yet: exp(-inf - 0) is 0

  for (int64_t q = 0; q < queries; ++q) {
    Vec a{}, b{};
    uint32_t factor = 0, add = 0;
    if (DROPS) dropout->query(query_tokens[q], factor, add);
    each_pair(keys, [&](int64_t k, Mask low, Mask high) {
      const float* s = scores + q * TILE + k;
      Vec x = exp2(low, rounded_product(times, load(s)) - shift[q], Vec{});
      Vec y = exp2(high, rounded_product(times, load(s + VL)) - shift[q], Vec{});
      a += x, b += y;
      if (DROPS) {
        x *= dropout->factors(load(key_tokens + k), factor, add);
        y *= dropout->factors(load(key_tokens + k + VL), factor, add);
      }
      store_pairs(weights + k * 2 * BLOCK + q * DEPTH, pairs(rounded(x), rounded(y)));
    });
    store(sum + q * VL, load(sum + q * VL) + (a + b));
  }
}

template <class Itinerary>
bool forward(const Itinerary& it, int64_t first, int64_t count, const TileForwardWorkspace& w) {
  const int64_t depth = w.depth, ld = w.ld;
  it.load_queries(it.a.query, first, count, w.query, depth, it.scale < 0 ? -1 : 1);
  if (it.dropout) number_queries(it, first, count, w.query_tokens);
  for (int64_t q = 0; q < round_up(count, BLOCK); ++q) w.shift[q] = -INFINITE, store(w.sum + q * VL, Vec{});
  if (it.keys == 0) zero(w.out, count * ld);
  typename Itinerary::Tile tiles[CHUNK_TILES];

  for (int64_t k0 = 0, chunk; k0 < it.keys; k0 += chunk) {
    chunk = least(w.chunk, it.keys - k0);
    w.load_keys(it, k0, chunk);
    if (it.dropout) number_keys(it, k0, chunk, w.key_tokens);
    if constexpr (Itinerary::ADJUSTS)
      for (int64_t k = 0; k < chunk; k += TILE) it.set_keys(tiles[k / TILE], k0 + k, least(TILE, chunk - k));
    for (int64_t q0 = 0; q0 < count; q0 += STRIP)
      for (int64_t k = 0; k < chunk; k += TILE) {
        const int64_t queries = least(STRIP, count - q0), keys = least(TILE, chunk - k);
        multiply_strip(queries, keys, w.query + q0 * depth, w.keys + k * depth, depth, w.scores);
        const float times = adjust(it, tiles[k / TILE], first + q0, queries, keys, w.scores);
        for (int64_t q = 0; q < queries; q += BLOCK) {
          auto softmax = [&]<bool DROPS>() {
            online_softmax_block<DROPS>(w.scores + q * TILE, least(BLOCK, queries - q), keys, times, w.shift + q0 + q,
                                        w.sum + (q0 + q) * VL, w.weights + q / BLOCK * BLOCK_SIZE, it.dropout,
                                        w.query_tokens + q0 + q, w.key_tokens + k, [&](int64_t i, float decay) {
              float* out = w.out + (q0 + q + i) * ld;
              if (k0 + k > 0)
                for (int64_t d = 0; d < ld; d += VL) store(out + d, decay * load(out + d));
            });
          };
          it.dropout ? softmax.template operator()<true>() : softmax.template operator()<false>();
        }
        multiply(k0 + k > 0, (queries + BLOCK - 1) / BLOCK, ld / BLOCK, (keys + DEPTH - 1) / DEPTH,
                 {w.weights, DEPTH, BLOCK_SIZE, 2 * BLOCK_SIZE}, {w.values + k * ld, ld * DEPTH, BLOCK_SIZE},
                 w.out + q0 * ld, ld);
      }
  }

  for (int64_t q = 0; q < count; ++q) {
    const float sum = total(load(w.sum + q * VL)), inverse = sum == 0 ? 0 : 1 / sum;
    for (int64_t d = 0; d < ld; d += VL) store(w.out + q * ld + d, inverse * load(w.out + q * ld + d));
    w.shift[q] = sum == 0 ? -INFINITE : w.shift[q] * LN2 + __builtin_logf(sum);
  }
  it.store_outputs(it.a.out, first, count, w.out, ld, 1);
  it.store_numbers(it.a.lse, first, count, w.shift);
  return shares_tiles(it) && !all_finite(w.out, count * ld);
}

template <class Itinerary, class Args>
void forward_tile_items(const Args& a, int64_t begin, int64_t end, float* workspace) {
  const TileForwardWorkspace w(a.D, a.panels, workspace);
  panel_items<Itinerary>(a, begin, end, a.panels * TILE, [&](const auto& it, int64_t first, int64_t count) {
    bool again = false;
    for (int64_t q = 0; q < count; q += w.held) again |= forward(it, first + q, least(w.held, count - q), w);
    return again;
  });
}

// As in flash.h, a chunk of queries is held while the keys stream past it.
struct TileBackwardWorkspace {
  int64_t depth, ld, kept, size;
  BFloat16 *rows, *key_columns, *key_terms, *value_columns;  // of a tile
  float *scores, *grad_scores;                               // of a strip
  BFloat16 *score_rows, *weights, *grads;                    // gradients of a strip, as A; of a span, as B
  float *grad_key_turned, *grad_value_turned;                // of a tile
  float *grad_key, *grad_value;                              // rows of the keys kept
  BFloat16 *query, *grad_out, *query_turned, *grad_out_turned;
  float *grad_query, *lse, *delta;
  uint32_t *key_tokens, *query_tokens;

  TileBackwardWorkspace(int64_t head_dim, int64_t chunk, int64_t queries, int64_t all_keys, float* base)
      : depth(round_up(head_dim, DEPTH)), ld(round_up(head_dim, BLOCK)),
        kept(queries > chunk ? round_up(all_keys, TILE) : TILE) {
    const int64_t held = least(round_up(chunk, STRIP), round_up(queries, STRIP)), span = least(SPAN, held);
    Pieces p{base};
    for (BFloat16** piece : {&rows, &key_columns, &value_columns}) *piece = take_halves(p, TILE * depth);
    key_terms = take_halves(p, TILE * ld);
    for (float** piece : {&scores, &grad_scores}) *piece = p.take(STRIP * TILE);
    score_rows = take_halves(p, STRIP * TILE);
    for (BFloat16** piece : {&weights, &grads}) *piece = take_halves(p, span * TILE);
    for (float** piece : {&grad_key_turned, &grad_value_turned}) *piece = p.take(ld * TILE + BLOCK);
    for (float** piece : {&grad_key, &grad_value}) *piece = p.take(kept * ld);
    for (BFloat16** piece : {&query, &grad_out, &query_turned, &grad_out_turned}) *piece = take_halves(p, held * depth);
    grad_query = p.take(held * ld);
    for (float** piece : {&lse, &delta}) *piece = p.take(held);
    query_tokens = (uint32_t*)p.take(held);
    key_tokens = (uint32_t*)p.take(TILE);
    size = p.used;
  }

  // The delta in memory is complete, or the products of out are still to be added.
  template <class Itinerary>
  void load_queries(const Itinerary& it, int64_t first, int64_t count, bool complete) const {
    const int64_t all = round_up(count, STRIP);
    it.load_queries(it.a.query, first, count, query, depth, it.scale < 0 ? -1 : 1);
    it.load_outputs(it.a.grad_out, first, count, grad_out, depth, 1);
    for (BFloat16* x : {query, grad_out}) zero(x + count * depth, (all - count) * depth);
    pack_turned(query_turned, query, depth, all);
    pack_turned(grad_out_turned, grad_out, depth, all);
    it.load_numbers(it.a.lse, first, count, lse);
    it.load_numbers(it.a.delta, first, count, delta);
    for (int64_t i = 0; i < count && !complete; i += TILE) {
      const int64_t n = least(TILE, count - i);
      it.load_outputs(it.a.out, first + i, n, rows, depth, 1);
      add_products(rows, grad_out + i * depth, n, depth, delta + i);
    }
    for (int64_t i = 0; i < count; ++i)
      if (delta[i] != delta[i]) delta[i] = __builtin_nanf("");  // one that rounding does not spoil
    for (int64_t i = count; i < all; ++i) lse[i] = -INFINITE, delta[i] = 0;
    if (it.dropout) number_queries(it, first, count, query_tokens);
    zero(grad_query, count * ld);
  }

  template <class Itinerary>
  void load_keys(const Itinerary& it, int64_t first, int64_t count) const {
    const int64_t all = round_up(count, DEPTH);
    it.load_keys(it.a.value, first, count, rows, depth, 1);
    zero(rows + count * depth, (all - count) * depth);
    pack_columns(value_columns, rows, depth, all);
    it.load_keys(it.a.key, first, count, rows, depth, 1);
    pack_columns(key_columns, rows, depth, all);
    pack_terms(key_terms, rows, depth, all, ld);
    if (it.dropout) number_keys(it, first, count, key_tokens);
  }

  template <class Itinerary>
  void store_keys(const Itinerary& it, int64_t first, int64_t count, int64_t row) const {
    it.store_keys(it.a.grad_value, first, count, grad_value + row * ld, ld, 1);
    it.store_keys(it.a.grad_key, first, count, grad_key + row * ld, ld, __builtin_fabsf(it.scale));
  }
};

// A query of a strip: the arguments of softmax_backward.
struct StripQuery {
  float shift, delta;
  Mask mask;         // no lane, if it has no keys or its lse is NaN
  Vec others;        // weights and gradients instead
  uint32_t times, add;

  VATTN_INLINE StripQuery(float lse, float delta, const Dropout* dropout, uint32_t token)
      : shift(lse * LOG2E), delta(delta), mask(lse == -INFINITE || lse != lse ? 0 : 0xffff),
        others(splat(lse != lse ? __builtin_nanf("") : 0)), times(0), add(0) {
    if (dropout) dropout->query(token, times, add);
  }
  // A vector of scores and of their gradients become weights and gradients.
  template <bool DROPS>
  VATTN_INLINE void softmax(Vec& score, Vec& grad, float factor, Mask lanes, const Dropout* dropout,
                            const uint32_t* tokens) const {
    const Vec p = exp2((Mask)(mask & lanes), factor * score - shift, others);
    Vec dropped = p;
    if (DROPS) {
      const Vec f = dropout->factors(load(tokens), times, add);
      grad *= f, dropped *= f;
    }
    grad = (Vec)_mm512_mask_mul_ps((__m512)others, (Mask)(mask & lanes), (__m512)p, (__m512)(grad - delta));
    score = dropped;
  }
};

// Gradients of queries i and i + 16 of a strip and of keys k and k + 16, and on, become pairs.
template <bool QUERY, bool KEY>
VATTN_INLINE void pack_grads(Vec g0, Vec g1, Vec g2, Vec g3, BFloat16* terms, BFloat16* rows, int64_t i, int64_t k) {
  const VecUint r0 = rounded(g0), r1 = rounded(g1), r2 = rounded(g2), r3 = rounded(g3);
  if constexpr (KEY) {
    terms += k / BLOCK * BLOCK_SIZE + i * DEPTH;
    store_pairs(terms, pairs(r0, r2)), store_pairs(terms + BLOCK_SIZE, pairs(r1, r3));
  }
  if constexpr (QUERY) {
    rows += k / DEPTH * 2 * BLOCK_SIZE + i * DEPTH;
    store_pairs(rows, pairs(r0, r1)), store_pairs(rows + BLOCK_SIZE, pairs(r2, r3));
  }
}

// Whether gradients are packed only after the itinerary, that of a part, has seen them.
template <class Itinerary>
constexpr bool CHANGES_GRADS = Itinerary::ADJUSTS && !Itinerary::SHARES_TILES;

// The scores of a strip, of which query q of those held is the first, and their gradients become weights and gradients.
template <bool QUERY, bool KEY, bool DROPS, class Itinerary>
VATTN_INLINE void softmax_backward_strip(const Itinerary& it, int64_t q, int64_t keys, float times,
                                         const TileBackwardWorkspace& w, BFloat16* weights, BFloat16* grads) {
  for (int64_t i = 0; i < BLOCK; ++i) {
    const int64_t upper = q + i, lower = upper + BLOCK;
    const StripQuery a(w.lse[upper], w.delta[upper], it.dropout, w.query_tokens[upper]);
    const StripQuery b(w.lse[lower], w.delta[lower], it.dropout, w.query_tokens[lower]);
    each_pair(keys, [&](int64_t k, Mask low, Mask high) {
      constexpr int64_t BELOW = BLOCK * TILE;
      float *s = w.scores + i * TILE + k, *g = w.grad_scores + i * TILE + k;
      Vec s0 = load(s), s1 = load(s + VL), s2 = load(s + BELOW), s3 = load(s + BELOW + VL);
      Vec g0 = load(g), g1 = load(g + VL), g2 = load(g + BELOW), g3 = load(g + BELOW + VL);
      const uint32_t* tokens = w.key_tokens + k;
      a.softmax<DROPS>(s0, g0, times, low, it.dropout, tokens);
      a.softmax<DROPS>(s1, g1, times, high, it.dropout, tokens + VL);
      b.softmax<DROPS>(s2, g2, times, low, it.dropout, tokens);
      b.softmax<DROPS>(s3, g3, times, high, it.dropout, tokens + VL);
      if constexpr (KEY) {
        BFloat16* to = weights + k / BLOCK * BLOCK_SIZE + i * DEPTH;
        store_pairs(to, pairs(rounded(s0), rounded(s2)));
        store_pairs(to + BLOCK_SIZE, pairs(rounded(s1), rounded(s3)));
      }
      if constexpr (QUERY && Itinerary::ADJUSTS) {
        store(g, g0), store(g + VL, g1), store(g + BELOW, g2), store(g + BELOW + VL, g3);
      }
      if constexpr (!QUERY || !CHANGES_GRADS<Itinerary>)
        pack_grads<QUERY, KEY>(g0, g1, g2, g3, grads, w.score_rows, i, k);
    });
  }
}

// A tile of keys against the queries held, `first` and on: as in flash.h.
template <bool QUERY, bool KEY, class Itinerary, class EachRow>
void backward_tile(const Itinerary& it, int64_t k0, int64_t keys, int64_t first, int64_t held,
                    const TileBackwardWorkspace& w, bool fresh, EachRow each_row) {
  const int64_t depth = w.depth, ld = w.ld, across = (keys + BLOCK - 1) / BLOCK;
  const int64_t deep = (keys + DEPTH - 1) / DEPTH;
  w.load_keys(it, k0, keys);
  typename Itinerary::Tile tile;
  if constexpr (Itinerary::ADJUSTS) it.set_keys(tile, k0, keys);

  for (int64_t q0 = 0; q0 < held; q0 += SPAN) {
    const int64_t span = least(SPAN, held - q0);
    for (int64_t q1 = 0; q1 < span; q1 += STRIP) {
      const int64_t q = q0 + q1, queries = least(STRIP, span - q1), down = (queries + BLOCK - 1) / BLOCK;
      multiply_strip(queries, keys, w.query + q * depth, w.key_columns, depth, w.scores);
      multiply_strip(queries, keys, w.grad_out + q * depth, w.value_columns, depth, w.grad_scores);
      const float times = adjust(it, tile, first + q, queries, keys, w.scores);
      BFloat16 *weights = w.weights + q1 * TILE, *grads = w.grads + q1 * TILE;
      if (it.dropout)
        softmax_backward_strip<QUERY, KEY, true>(it, q, keys, times, w, weights, grads);
      else
        softmax_backward_strip<QUERY, KEY, false>(it, q, keys, times, w, weights, grads);
      if constexpr (Itinerary::ADJUSTS && QUERY) it.adjust_grads(tile, first + q, queries, w.grad_scores);
      if constexpr (QUERY && CHANGES_GRADS<Itinerary>)
        for (int64_t i = 0; i < BLOCK; ++i)
          for (int64_t k = 0; k < keys; k += DEPTH) {
            const float* g = w.grad_scores + k + i * TILE;
            pack_grads<QUERY, KEY>(load(g), load(g + VL), load(g + BLOCK * TILE), load(g + BLOCK * TILE + VL), grads,
                                   w.score_rows, i, k);
          }
      if constexpr (QUERY)
        multiply(true, down, ld / BLOCK, deep, {w.score_rows, DEPTH, BLOCK_SIZE, 2 * BLOCK_SIZE},
                 {w.key_terms, ld * DEPTH, BLOCK_SIZE}, w.grad_query + q * ld, ld);
    }
    if constexpr (KEY) {
      const int64_t strips = (span + STRIP - 1) / STRIP, along = depth / BLOCK * BLOCK_SIZE;
      auto turned = [&](const BFloat16* rows, const BFloat16* terms, float* grads) {
        multiply(q0 > 0, ld / BLOCK, across, strips, {rows + q0 * depth, DEPTH, BLOCK_SIZE, along},
                 {terms, TILE / BLOCK * BLOCK_SIZE, BLOCK_SIZE}, grads, TILE);
      };
      turned(w.grad_out_turned, w.weights, w.grad_value_turned);
      turned(w.query_turned, w.grads, w.grad_key_turned);
    }
  }
  if constexpr (KEY)
    if (held > 0)
      each_row([&](int64_t row, int64_t count, int64_t before) {
        add_turned(!fresh, w.grad_value + row * ld, ld, w.grad_value_turned + before, TILE, count, ld);
        add_turned(!fresh, w.grad_key + row * ld, ld, w.grad_key_turned + before, TILE, count, ld);
      });
}

}  // namespace VATTN_ISA
}  // namespace vattn
