// The library's one online-softmax core in C++: attention of a tile of queries, and its gradients. flash_tangent.h has its
// tangent.
//
//     s = scale * q k^T,   p = exp(s - lse),   out = p v
//     dv = p^T do,   dp = do v^T,   ds = p * (dp - delta),   dq = scale * ds k,   dk = scale * ds^T q
//
// It works on tiles. An itinerary says where the rows of a tile are in memory:
//
//     a                                                      the operator's arguments, with its tensors: kernels.h
//     int64_t head_dim, queries, keys;  float scale;  const Dropout* dropout;
//     load_queries / store_queries (tensor, first, count, rows, ld, times)     rows of a tensor, as floats
//     load_keys / store_keys       (likewise)
//     load_outputs / store_outputs (likewise)                what belongs to queries and comes after the softmax
//     load_numbers / store_numbers (numbers, first, count, floats)             a number for each query, such as lse
//     query_tokens / key_tokens (first, count, integers)     the operator's own numbers of rows
//     ADJUSTS      whether scores are more than products; if so, on a tile of them, a row of TILE for each query:
//         Tile, set_keys (tile, first, count)                what it needs of a tile of keys, computed once
//         adjust_scores (tile, first query, count, scores)   in units of log2
//         adjust_grads (likewise)                            gradients of those, to take a share of
//         adjust_tangents (likewise)                         tangents of those, not in units of log2
//     HAS_VALUES   whether there are values and an output; without, the forward ends with, and add_weights begins with,
//                  the maximum and the sum of a query's powers of 2: a.maximum, a.sum (or, if it is given, with a.lse)
//     SHARES_KEYS  whether keys belong to several components, the units of a head; each_piece (first, count, f) then
//                  tells which rows of all keys a tile has, and store_keys stores all keys as they lie
//     SHARES_TILES whether queries may meet keys in a tile that they do not read, by a score of -inf; if so,
//         shares_tiles ()                                    whether some of this component do
//         each_part (a, index, slice, first, count, f)       f(itinerary, first, count) for parts of those queries of
//                                                            component `index`, each with the keys that it reads
//
// A weight of 0 makes NaN of what is not finite, in rows that do not read it. So where a result is not finite, and
// queries share tiles with keys that they do not read, the caller takes the parts one by one: to these, the keys that
// they do not read are rows of 0, and have no gradient. What is finite has the same bits either way.
//
// A panel holds TILE keys, transposed, so that a vector of scores is VL keys of one query; whatever else there is lies
// as rows.
//
//            TILE keys                        ld channels
//     D   [ K^T panel      ]               k [ V              ]
//     q   [ S   (then P)   ]  <- queries   q [ O              ]  <- P V
//
// Backward likewise:  dK += dS^T Q,  dV += P^T dO,  dQ += dS K.
#pragma once

#include "dropout.h"
#include "gemm.h"

namespace vattn {
namespace VATTN_ISA {

constexpr int64_t TILE = 64;
// Rows to fetch early, about a tile: each may lie on a page of its own, which no processor foresees.
constexpr int64_t AHEAD = 64;

// Hands out pieces of one thread's workspace; without one, it only counts.
struct Pieces {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return piece;
  }
};

constexpr int64_t FORWARD_TILES = 4;     // of keys in a chunk, at most
constexpr int64_t FORWARD_QUERIES = 24;  // whose scores with a chunk of keys stay in the first-level cache

constexpr int64_t forward_chunk(int64_t head_dim) { return (head_dim <= 128 ? FORWARD_TILES : FORWARD_TILES / 2) * TILE; }

// Of the forward: a chunk of keys, whose weights have one maximum, and as many queries as share a load of it. Where all
// keys are one chunk, queries are done with after a block of them, and only a block is held.
struct ForwardWorkspace {
  int64_t ld, chunk, size;
  float *query, *out, *sum, *maximum;  // of the queries held; sums are kept lane by lane
  float *keys, *key_panels, *values;   // keys: of one tile, as rows
  float* scores;                       // of FORWARD_QUERIES queries
  uint32_t *query_tokens, *key_tokens;  // of a block of queries

  ForwardWorkspace(int64_t head_dim, int64_t panels, int64_t all_keys, float* base)
      : ld(round_up(head_dim, VL)), chunk(forward_chunk(head_dim)) {
    const int64_t queries = all_keys > chunk ? panels * TILE : TILE;
    Pieces p{base};
    for (float** piece : {&query, &out}) *piece = p.take(queries * ld);
    sum = p.take(queries * VL);
    maximum = p.take(queries);
    keys = p.take(TILE * ld);
    for (float** piece : {&key_panels, &values}) *piece = p.take(chunk * ld);
    scores = p.take(FORWARD_QUERIES * chunk);
    query_tokens = (uint32_t*)p.take(TILE);
    key_tokens = (uint32_t*)p.take(chunk);
    size = p.used;
  }
};

// The numbers of rows for dropout.
template <class Itinerary>
VATTN_INLINE void number_queries(const Itinerary& it, int64_t first, int64_t count, uint32_t* tokens) {
  it.query_tokens(first, count, tokens);
  Dropout::renumber(it.dropout->numbers.queries, count, tokens);
}
template <class Itinerary>
VATTN_INLINE void number_keys(const Itinerary& it, int64_t first, int64_t count, uint32_t* tokens) {
  it.key_tokens(first, count, tokens);
  Dropout::renumber(it.dropout->numbers.keys, count, tokens);
}

// Drops weights of one query: a row of each tile of keys.
VATTN_INLINE void drop(const Dropout& dropout, uint32_t query_token, const uint32_t* key_tokens, int64_t keys,
                       float* weights) {
  uint32_t times, add;
  dropout.query(query_token, times, add);
  for (int64_t k = 0; k < keys; k += TILE, weights += FORWARD_QUERIES * TILE)
    for (int64_t j = 0; j < least(TILE, keys - k); j += VL)
      store(weights + j, load(weights + j) * dropout.factors(load(key_tokens + k + j), times, add));
}

// Calls f(scores of VL keys) for those of one query, a row of each tile of keys.
template <class F>
VATTN_INLINE void each_vector(float* scores, int64_t keys, F f) {
  for (int64_t rest = keys; rest > 0; rest -= TILE, scores += FORWARD_QUERIES * TILE) {
    if (rest >= TILE) {
#pragma GCC unroll 16
      for (int64_t j = 0; j < TILE; j += VL) f(scores + j);
    } else {
      for (int64_t j = 0; j < rest; j += VL) f(scores + j);
    }
  }
}

// Scores of some queries become weights. `decays` gets the factor for what a query has summed up before, whose maximum
// may have grown. In three passes, in which no query waits for another.
VATTN_INLINE void online_softmax(float* scores, int64_t queries, int64_t keys, float* maximum, float* sum,
                                 float* decays) {
  float shifts[FORWARD_QUERIES];
  for (int64_t q = 0; q < queries; ++q) {
    Vec most = splat(maximum[q]);
    each_vector(scores + q * TILE, keys, [&](const float* s) { most = larger(load(s), most); });
    shifts[q] = largest(most);
  }
  for (int64_t q = 0; q < queries; ++q) {
    const float old = maximum[q];
    maximum[q] = shifts[q];
    if (shifts[q] == -INFINITE) shifts[q] = 0;  // no key yet: exp(-inf - 0) is 0
    decays[q] = old - shifts[q];
  }
  for (int64_t q = 0; q < round_up(queries, VL); q += VL) store(decays + q, exp2(load(decays + q)));
  for (int64_t q = 0; q < queries; ++q) {
    const Vec shift = splat(shifts[q]);
    Vec total = load(sum + q * VL) * decays[q];
    each_vector(scores + q * TILE, keys, [&](float* s) {
      Vec weight = exp2(load(s) - shift);
      store(s, weight);
      total += weight;
    });
    store(sum + q * VL, total);
  }
}

template <class Itinerary>
VATTN_INLINE bool shares_tiles(const Itinerary& it) {
  if constexpr (Itinerary::SHARES_TILES) return it.shares_tiles();
  return false;
}

// Normalises and stores the outputs of queries, after all keys. Returns whether their outputs are finite, if it matters.
template <class Itinerary>
bool finish(const Itinerary& it, int64_t first, int64_t count, float* out, int64_t ld, float* maximum, float* sum) {
  for (int64_t q = 0; q < count; ++q) sum[q] = total(load(sum + q * VL));
  if constexpr (!Itinerary::HAS_VALUES) {
    it.store_numbers(it.a.maximum, first, count, maximum);
    it.store_numbers(it.a.sum, first, count, sum);
    return true;
  } else {
    for (int64_t q = 0; q < count; ++q) {
      const float inverse = sum[q] == 0 ? 0 : 1 / sum[q];
      for (int64_t d = 0; d < ld; d += VL) store(out + q * ld + d, inverse * load(out + q * ld + d));
      sum[q] = sum[q] == 0 ? -INFINITE : maximum[q] * LN2 + __builtin_logf(sum[q]);
    }
    it.store_outputs(it.a.out, first, count, out, ld, 1);
    it.store_numbers(it.a.lse, first, count, sum);
    return !shares_tiles(it) || all_finite(out, count * ld);
  }
}

// Returns, as do the backward and the tangent, whether to take the queries in parts instead.
template <class Itinerary>
bool forward(const Itinerary& it, int64_t first, int64_t count, float* workspace) {
  constexpr bool HAS_VALUES = Itinerary::HAS_VALUES;
  const int64_t D = it.head_dim;
  const ForwardWorkspace w(D, (count + TILE - 1) / TILE, it.keys, workspace);
  const int64_t ld = w.ld;
  const Dropout* dropout = it.dropout;
  typename Itinerary::Tile tiles[FORWARD_TILES];
  bool finite = true;

  int64_t k0 = 0;
  do {
    const int64_t keys = least(w.chunk, it.keys - k0);
    if (dropout) number_keys(it, k0, keys, w.key_tokens);
    for (int64_t q0 = 0; q0 < count; q0 += FORWARD_QUERIES) {
      const int64_t queries = least(FORWARD_QUERIES, count - q0);
      const int64_t row = it.keys > w.chunk ? q0 : 0;
      float *query = w.query + row * ld, *out = w.out + row * ld, *sum = w.sum + row * VL, *maximum = w.maximum + row;
      if (dropout) number_queries(it, first + q0, queries, w.query_tokens);
      if (k0 == 0) {
        it.load_queries(it.a.query, first + q0, queries, query, ld, it.scale * LOG2E);
        for (int64_t q = 0; q < queries; ++q) maximum[q] = -INFINITE, store(sum + q * VL, Vec{});
        if (keys == 0) zero(out, queries * ld);
      }
      for (int64_t k = 0; k < keys; k += TILE) {
        const int64_t n = least(TILE, keys - k), columns = round_up(n, VL);
        float *scores = w.scores + k * FORWARD_QUERIES, *key_panel = w.key_panels + k * ld;
        if (q0 == 0) {
          it.load_keys(it.a.key, k0 + k, n, w.keys, ld, 1);
          zero(w.keys + n * ld, (columns - n) * ld);
          transpose(key_panel, TILE, w.keys, ld, columns, ld);
          if constexpr (Itinerary::ADJUSTS) it.set_keys(tiles[k / TILE], k0 + k, n);
        }
        multiply(false, queries, columns, D, {query, ld, 1}, key_panel, TILE, scores, TILE);
        if constexpr (Itinerary::ADJUSTS) it.adjust_scores(tiles[k / TILE], first + q0, queries, scores);
        for (int64_t q = 0; q < queries && n < columns; ++q)
          for (int64_t j = n; j < columns; ++j) scores[q * TILE + j] = -INFINITE;
      }
      float decays[FORWARD_QUERIES + VL] = {};
      online_softmax(w.scores, queries, keys, maximum, sum, decays);
      for (int64_t q = 0; q < queries; ++q) {
        if (k0 > 0 && decays[q] != 1)
          for (int64_t d = 0; d < ld; d += VL) store(out + q * ld + d, decays[q] * load(out + q * ld + d));
        if (dropout) drop(*dropout, w.query_tokens[q], w.key_tokens, keys, w.scores + q * TILE);
      }
      if constexpr (HAS_VALUES)
        for (int64_t k = 0; k < keys; k += TILE) {
          const int64_t n = least(TILE, keys - k);
          float* values = w.values + k * ld;
          if (q0 == 0) it.load_keys(it.a.value, k0 + k, n, values, ld, 1);
          multiply(k0 + k > 0, queries, ld, n, {w.scores + k * FORWARD_QUERIES, TILE, 1}, values, ld, out, ld);
        }
      if (k0 + keys == it.keys) finite &= finish(it, first + q0, queries, out, ld, maximum, sum);
    }
    k0 += keys;
  } while (k0 < it.keys);
  return shares_tiles(it) && !finite;
}

// delta = sum over channels of out * d out, minus the gradient of lse: here the sum, added to `delta`.
VATTN_INLINE void add_products(const float* out, const float* grad_out, int64_t count, int64_t ld, float* delta) {
  for (int64_t i = 0; i < count; ++i) {
    Vec products{};
    for (int64_t d = 0; d < ld; d += VL) products += load(out + i * ld + d) * load(grad_out + i * ld + d);
    delta[i] += total(products);
  }
}

// Completes the delta in memory of a tile of queries.
template <class Itinerary>
void delta(const Itinerary& it, int64_t first, int64_t count, float* workspace) {
  const ForwardWorkspace w(it.head_dim, 1, 0, workspace);
  it.load_outputs(it.a.out, first, count, w.out, w.ld, 1);
  it.load_outputs(it.a.grad_out, first, count, w.query, w.ld, 1);
  it.load_numbers(it.a.delta, first, count, w.sum);
  add_products(w.out, w.query, count, w.ld, w.sum);
  it.store_numbers(it.a.delta, first, count, w.sum);
}

// How a backward is cut. A chunk of queries is held while the keys stream past it; if one chunk is not all queries that
// read them, the gradients of all keys are kept until the last.
struct BackwardWorkspace {
  int64_t ld, kept, size;  // kept: keys whose gradients are
  float *keys, *key_panel, *value_panel, *weights, *grad_scores;
  float *grad_key, *grad_value;                        // rows of the keys kept
  float *query, *grad_out, *grad_query, *lse, *delta;  // of the queries held
  uint32_t *key_tokens, *query_tokens;

  BackwardWorkspace(int64_t head_dim, int64_t chunk, int64_t queries, int64_t all_keys, float* base)
      : ld(round_up(head_dim, VL)), kept(queries > chunk ? round_up(all_keys, TILE) : TILE) {
    int64_t held = least(chunk, round_up(queries, TILE));
    Pieces p{base};
    for (float** piece : {&keys, &key_panel, &value_panel}) *piece = p.take(TILE * ld);
    for (float** piece : {&weights, &grad_scores}) *piece = p.take(TILE * TILE);
    for (float** piece : {&grad_key, &grad_value}) *piece = p.take(kept * ld);
    for (float** piece : {&query, &grad_out, &grad_query}) *piece = p.take(held * ld);
    for (float** piece : {&lse, &delta}) *piece = p.take(held);
    query_tokens = (uint32_t*)p.take(held);
    key_tokens = (uint32_t*)p.take(TILE);
    size = p.used;
  }

  // The delta in memory is complete, or the products of out are still to be added.
  template <class Itinerary>
  void load_queries(const Itinerary& it, int64_t first, int64_t count, bool complete) const {
    it.load_queries(it.a.query, first, count, query, ld, it.scale * LOG2E);
    it.load_outputs(it.a.grad_out, first, count, grad_out, ld, 1);
    it.load_numbers(it.a.lse, first, count, lse);
    it.load_numbers(it.a.delta, first, count, delta);
    for (int64_t i = 0; i < count && !complete; i += TILE) {
      int64_t rows = least(TILE, count - i);
      it.load_outputs(it.a.out, first + i, rows, keys, ld, 1);
      add_products(keys, grad_out + i * ld, rows, ld, delta + i);
    }
    if (it.dropout) number_queries(it, first, count, query_tokens);
    zero(grad_query, count * ld);
  }

  // The gradients of keys, from row `row` of those kept. Queries carry scale * log2(e): the factor ln(2) leaves scale.
  template <class Itinerary>
  void store_keys(const Itinerary& it, int64_t first, int64_t count, int64_t row) const {
    it.store_keys(it.a.grad_value, first, count, grad_value + row * ld, ld, 1);
    it.store_keys(it.a.grad_key, first, count, grad_key + row * ld, ld, LN2);
  }
};

// The lse of a query in units of log2, in two parts, since one rounding of it would be in all weights of the query.
struct Lse2 {
  float shift, rest;
  VATTN_INLINE explicit Lse2(float lse) {
    const double exact = (double)lse * LOG2E_EXACT;
    shift = (float)exact, rest = (float)(exact - shift);
  }
};

// Scores and their gradients, a row of either for one query, become weights and gradients of scores.
VATTN_INLINE void softmax_backward(float* weights, float* grads, int64_t columns, float lse, float delta,
                                   const Dropout* dropout, uint32_t query_token, const uint32_t* key_tokens) {
  if (lse == -INFINITE) return zero(weights, columns), zero(grads, columns);  // no keys, whatever the gradient
  const auto [shift, rest] = Lse2(lse);
  uint32_t times = 0, add = 0;
  if (dropout) dropout->query(query_token, times, add);
  for (int64_t j = 0; j < columns; j += VL) {
    Vec p = exp2(load(weights + j) - shift - rest), dp = load(grads + j), dropped = p;
    if (dropout) {
      Vec factor = dropout->factors(load(key_tokens + j), times, add);
      dp *= factor;
      dropped *= factor;
    }
    store(weights + j, dropped);
    store(grads + j, p * (dp - delta));
  }
}

// One tile of keys against the queries held, `first` and on: adds to grad_query of those if QUERY, and to rows of the
// keys kept if KEY: each_row calls back with (row, count, keys before) for each piece of the tile. Rows that are
// `fresh` hold nothing yet.
template <bool QUERY, bool KEY, class Itinerary, class EachRow>
void backward_tile(const Itinerary& it, int64_t k0, int64_t keys, int64_t first, int64_t held,
                   const BackwardWorkspace& w, bool fresh, EachRow each_row) {
  const int64_t D = it.head_dim, ld = w.ld, columns = round_up(keys, VL);
  it.load_keys(it.a.value, k0, keys, w.keys, ld, 1);
  zero(w.keys + keys * ld, (columns - keys) * ld);
  transpose(w.value_panel, TILE, w.keys, ld, columns, ld);
  it.load_keys(it.a.key, k0, keys, w.keys, ld, 1);
  transpose(w.key_panel, TILE, w.keys, ld, columns, ld);
  if (it.dropout) number_keys(it, k0, keys, w.key_tokens);
  typename Itinerary::Tile tile;
  if constexpr (Itinerary::ADJUSTS) it.set_keys(tile, k0, keys);

  for (int64_t q0 = 0; q0 < held; q0 += TILE) {
    int64_t queries = least(TILE, held - q0);
    const float *query = w.query + q0 * ld, *grad_out = w.grad_out + q0 * ld;
    multiply(false, queries, columns, D, {query, ld, 1}, w.key_panel, TILE, w.weights, TILE);
    multiply(false, queries, columns, D, {grad_out, ld, 1}, w.value_panel, TILE, w.grad_scores, TILE);
    if constexpr (Itinerary::ADJUSTS) it.adjust_scores(tile, first + q0, queries, w.weights);
    for (int64_t q = 0; q < queries; ++q)
      softmax_backward(w.weights + q * TILE, w.grad_scores + q * TILE, columns, w.lse[q0 + q], w.delta[q0 + q],
                       it.dropout, w.query_tokens[q0 + q], w.key_tokens);
    if constexpr (Itinerary::ADJUSTS && QUERY) it.adjust_grads(tile, first + q0, queries, w.grad_scores);
    if constexpr (KEY)
      each_row([&](int64_t row, int64_t count, int64_t before) {
        float *grad_value = w.grad_value + row * ld, *grad_key = w.grad_key + row * ld;
        const bool more = !fresh || q0 > 0;
        multiply(more, count, ld, queries, {w.weights + before, 1, TILE}, grad_out, ld, grad_value, ld);
        multiply(more, count, ld, queries, {w.grad_scores + before, 1, TILE}, query, ld, grad_key, ld);
      });
    if constexpr (QUERY)
      multiply(true, queries, ld, keys, {w.grad_scores, TILE, 1}, w.keys, ld, w.grad_query + q0 * ld, ld);
  }
}

// The gradients of the given queries, if QUERY, and of the given keys, if KEY, from the pairs that they form:
// five products for both at once, four and three for either alone. Keys that are shared are all kept, in rows as they
// lie, and stored by the caller, who says whether they are fresh. The workspace chooses the backward_tile.
template <bool QUERY, bool KEY, class Itinerary, class Workspace>
bool backward(const Itinerary& it, int64_t chunk, int64_t query_begin, int64_t query_end, int64_t key_begin,
              int64_t key_end, const Workspace& w, bool fresh = true) {
  constexpr bool SHARED = Itinerary::SHARES_KEYS;
  const int64_t ld = w.ld;
  bool finite = true;
  int64_t q0 = query_begin;
  do {
    int64_t held = least(chunk, query_end - q0);
    bool last = q0 + held == query_end;
    w.load_queries(it, q0, held, !(QUERY && KEY));  // with both gradients every query is read once
    for (int64_t k0 = key_begin; k0 < key_end; k0 += TILE) {
      int64_t keys = least(TILE, key_end - k0), row = (k0 - key_begin) % w.kept;
      if (KEY && held == 0) zero(w.grad_key + row * ld, keys * ld), zero(w.grad_value + row * ld, keys * ld);
      backward_tile<QUERY, KEY>(it, k0, keys, q0, held, w, fresh, [&](auto piece) {
        if constexpr (SHARED)
          it.each_piece(k0, keys, piece);
        else
          piece(row, keys, 0);
      });
      if constexpr (KEY && !SHARED)
        if (last) {
          if (shares_tiles(it))
            for (const float* grad : {w.grad_key, w.grad_value}) finite &= all_finite(grad + row * ld, keys * ld);
          w.store_keys(it, k0, keys, row);
        }
    }
    if constexpr (QUERY) {
      if (shares_tiles(it)) finite &= all_finite(w.grad_query, held * ld);
      it.store_queries(it.a.grad_query, q0, held, w.grad_query, ld, it.scale);
    }
    q0 += held, fresh = false;
  } while (q0 < query_end);
  return !finite;
}

}  // namespace VATTN_ISA
}  // namespace vattn
