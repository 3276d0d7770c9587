// The nearest code of each vector: products in float tell which codes may be nearest, and distances in double decide.
//
//     |x - c|^2 = |x - m|^2 + 2 score(c),   score(c) = |c - m|^2 / 2 - (x - m)(c - m),   m amid the codes
//
// Without m, vectors far from 0 would lose to rounding all that tells their codes apart. A score is off by less than
// half a `tolerance`: codes whose scores differ by more need no second look, and few others are ever met.
//
//            TILE vectors
//     C   [ (X - m)^T panel ]
//     k   [ products        ]  <- codes - m               in each column the lowest score so far, and its code
#pragma once

#include "flash.h"

namespace vattn {
namespace VATTN_ISA {

constexpr int64_t LONG_SUM = 128;  // terms of a product: scores have a tolerance, and fewer sums take less time

typedef double VecDouble __attribute__((vector_size(VATTN_VECTOR_BYTES)));
typedef float VecNarrowLoose __attribute__((vector_size(VATTN_VECTOR_BYTES / 2), aligned(4), may_alias));

struct NearestWorkspace {
  float *panels, *codes, *products, *lowest, *tolerance, *vector, *code;
  int32_t* index;
  int64_t ld, size;

  NearestWorkspace(int64_t C, int64_t count, float* base) : ld(round_up(C, VL)) {
    Pieces p{base};
    panels = p.take(count * TILE * ld);
    codes = p.take(TILE * ld);
    products = p.take(TILE * (ld > TILE ? ld : TILE));  // at first, the rows of a panel
    for (float** piece : {&lowest, &tolerance}) *piece = p.take(count * TILE);
    index = (int32_t*)p.take(count * TILE);
    for (float** piece : {&vector, &code}) *piece = p.take(ld);
    size = p.used;
  }
};

template <class T>
VATTN_INLINE void gather(float* to, const T* from, int64_t step, int64_t n) {
  if (step == 1) return copy(to, from, n);
  for (int64_t i = 0; i < n; ++i) copy(to + i, from + i * step, 1);
}

// Channels [begin, end) of the mean of the codes; what is not finite tells nothing of where they are.
template <class T>
void center_codes(const NearestCode& a, int64_t begin, int64_t end, float* code) {
  float* center = a.center + begin;
  const int64_t channels = end - begin;
  zero(center, channels);
  for (int64_t k = 0; k < a.K; ++k) {
    copy(code, (const T*)a.codebook + k * a.code_step + begin, channels);
    for (int64_t c = 0; c < channels; ++c) center[c] += code[c] - code[c] == 0 ? code[c] : 0;
  }
  for (int64_t c = 0; c < channels; ++c) center[c] = center[c] - center[c] == 0 ? center[c] / (float)a.K : 0;
}

template <class T>
VATTN_INLINE void load_centered(const NearestCode& a, int64_t k, float* code) {
  copy(code, (const T*)a.codebook + k * a.code_step, a.C);
  for (int64_t c = 0; c < a.C; ++c) code[c] -= a.center[c];
}

// Half the squares of the codes [begin, end) without their center.
template <class T>
void square_codes(const NearestCode& a, int64_t begin, int64_t end, float* code) {
  for (int64_t k = begin; k < end; ++k) {
    load_centered<T>(a, k, code);
    double square = 0;
    for (int64_t c = 0; c < a.C; ++c) square += (double)code[c] * code[c];
    a.half_squares[k] = (float)(square / 2);
  }
}

// A panel of `count` vectors, of which `first` is the first.
template <class T>
struct VectorPanel {
  const NearestCode& a;
  const NearestWorkspace& w;
  int64_t first, count;
  float *panel, *lowest, *tolerance;
  int32_t* index;

  VectorPanel(const NearestCode& a, const NearestWorkspace& w, int64_t first, int64_t count, int64_t p)
      : a(a), w(w), first(first), count(count), panel(w.panels + p * TILE * w.ld), lowest(w.lowest + p * TILE),
        tolerance(w.tolerance + p * TILE), index(w.index + p * TILE) {}

  // Where `n` vectors from vector i on are.
  void places(int64_t i, int64_t n, const T** at) const {
    int64_t place[NearestCode::MAX_AXES];
    const T* p = (const T*)a.x;
    for (int64_t axis = a.axes - 1; axis >= 0; --axis) {
      place[axis] = i % a.sizes[axis], i /= a.sizes[axis];
      p += place[axis] * a.steps[axis];
    }
    for (int64_t j = 0; j < n; ++j) {
      at[j] = p;
      for (int64_t axis = a.axes - 1; axis >= 0; --axis) {
        p += a.steps[axis];
        if (++place[axis] < a.sizes[axis]) break;
        p -= place[axis] * a.steps[axis], place[axis] = 0;
      }
    }
  }

  void start() const {
    const int64_t columns = round_up(count, VL);
    const T* at[TILE];
    places(first, count, at);
    bool side_by_side = a.channel != 1;
    for (int64_t i = 0; i < count; ++i) side_by_side &= at[i] == at[0] + i;
    if (side_by_side) {  // as in (B, C, T, H, W)
      for (int64_t c = 0; c < a.C; ++c) {
        store(panel + c * TILE + columns - VL, Vec{});
        copy(panel + c * TILE, at[0] + c * a.channel, count);
      }
    } else {
      float* rows = w.products;
      for (int64_t i = 0; i < count; ++i) gather(rows + i * w.ld, at[i], a.channel, a.C);
      zero(rows + count * w.ld, (columns - count) * w.ld);
      transpose(panel, TILE, rows, w.ld, columns, w.ld);
    }
    for (int64_t j = 0; j < columns; j += VL) {
      Vec square{};
      for (int64_t c = 0; c < a.C; ++c) {
        Vec x = load(panel + c * TILE + j) - a.center[c];
        store(panel + c * TILE + j, x);
        square += x * x;
      }
      for (int l = 0; l < VL; ++l) tolerance[j + l] = a.tolerance * (__builtin_sqrtf(square[l]) + a.longest);
      store(lowest + j, splat(INFINITE));
    }
    for (int64_t j = 0; j < columns; ++j) index[j] = 0;
  }

  // Reads the products with a tile of `codes` codes, of which k0 is the first.
  void meet(int64_t k0, int64_t codes) const {
    const float* half_squares = a.half_squares + k0;
    for (int64_t j = 0; j < count; j += VL) {
      Vec best = splat(INFINITE), second = best;
      VecInt which{};
      for (int64_t k = 0; k < codes; ++k) {
        Vec score = half_squares[k] - load(w.products + k * TILE + j);
        VecInt lower = score < best;
        second = lower ? best : score < second ? score : second;
        best = lower ? score : best;
        which = lower ? VecInt{} + (int32_t)(k0 + k) : which;
      }
      Vec before = load(lowest + j), near = load(tolerance + j);
      VecInt wins = (best < before - near) & (second > best + near), loses = best > before + near;
      store(lowest + j, wins ? best : before);
      for (int l = 0; l < VL; ++l) index[j + l] = wins[l] ? which[l] : index[j + l];
      for (int l = 0; l < VL && j + l < count; ++l)
        if (!(wins[l] | loses[l])) settle(k0, codes, j + l);
    }
  }

  // The same for vector `i` alone, where scores are too close to tell codes apart.
  void settle(int64_t k0, int64_t codes, int64_t i) const {
    const float near = tolerance[i];
    const T* at;
    places(first + i, 1, &at);
    gather(w.vector, at, a.channel, a.C);
    double nearest = -1;  // not known yet
    for (int64_t k = k0; k < k0 + codes; ++k) {
      float score = a.half_squares[k] - w.products[(k - k0) * TILE + i];
      if (!(score <= lowest[i] + near)) continue;
      if (score < lowest[i] - near) {
        index[i] = (int32_t)k, nearest = -1;
      } else {
        if (nearest < 0) nearest = distance(index[i]);
        double other = distance(k);
        if (other < nearest) index[i] = (int32_t)k, nearest = other;
      }
      lowest[i] = score < lowest[i] ? score : lowest[i];
    }
  }

  // Between the vector that is settled and code k, squared.
  double distance(int64_t k) const {
    copy(w.code, (const T*)a.codebook + k * a.code_step, a.C);
    VecDouble sum{};
    for (int64_t c = 0; c < w.ld; c += VL / 2) {
      auto wide = [c](const float* p) { return __builtin_convertvector(*(const VecNarrowLoose*)(p + c), VecDouble); };
      VecDouble difference = wide(w.vector) - wide(w.code);
      sum += difference * difference;
    }
    double total = 0;
    for (int l = 0; l < VL / 2; ++l) total += sum[l];
    return total;
  }
};

template <class T>
void nearest_code(const NearestCode& a, int64_t begin, int64_t end, float* workspace) {
  const NearestWorkspace w(a.C, a.panels, workspace);
  zero(w.vector, w.ld), zero(w.code, w.ld);
  for (int64_t item = begin; item < end; ++item) {
    auto panel = [&](int64_t p) {
      int64_t first = (item * a.panels + p) * TILE;
      return VectorPanel<T>(a, w, first, least(TILE, a.vectors - first), p);
    };
    int64_t first = item * a.panels * TILE, panels = (least(a.panels * TILE, a.vectors - first) + TILE - 1) / TILE;
    for (int64_t p = 0; p < panels; ++p) panel(p).start();
    for (int64_t k0 = 0; k0 < a.K; k0 += TILE) {
      int64_t codes = least(TILE, a.K - k0);
      for (int64_t k = 0; k < codes; ++k) load_centered<T>(a, k0 + k, w.codes + k * w.ld);
      for (int64_t p = 0; p < panels; ++p) {
        VectorPanel<T> vectors = panel(p);
        multiply(false, codes, round_up(vectors.count, VL), a.C, {w.codes, w.ld, 1}, vectors.panel, TILE,
                 w.products, TILE, LONG_SUM);
        vectors.meet(k0, codes);
      }
    }
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t i = 0; i < panel(p).count; ++i) a.index[panel(p).first + i] = w.index[p * TILE + i];
  }
}

}  // namespace VATTN_ISA
}  // namespace vattn
