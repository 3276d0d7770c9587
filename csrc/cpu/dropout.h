// Which attention weights dropout keeps: the hash of vattn/reference/dropout.py, on vectors.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace vattn {
namespace VATTN_ISA {

template <class U>
VATTN_INLINE U mix(U x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0xD35A2D97u;
  return x ^ (x >> 15);
}

// The decisions of one batch and head.
struct Dropout {
  float p;
  float factor;        // of a kept weight
  uint32_t threshold;  // of the upper 24 bits of the hash
  uint32_t bh;         // the hash of (seed, batch and head)
  Numbers numbers;

  Dropout(float p, int64_t seed, const Numbers& numbers, int64_t bh_index)
      : p(p), factor(p < 1 ? 1 / (1 - p) : 0), threshold((uint32_t)__builtin_ceil((double)p * (1 << 24))),
        numbers(numbers) {
    if (numbers.heads) bh_index = numbers.heads[bh_index];
    bh = mix(mix((uint32_t)seed + (uint32_t)bh_index) ^ (uint32_t)((uint64_t)seed >> 32));
  }

  // Tokens as the hash numbers them, from tokens of this call: `of` is numbers.queries or numbers.keys.
  static void renumber(const int64_t* of, int64_t count, uint32_t* tokens) {
    for (int64_t i = 0; of && i < count; ++i) tokens[i] = (uint32_t)of[tokens[i]];
  }

  template <class U>
  VATTN_INLINE void query(U token, U& times, U& add) const {
    add = mix(bh + token);
    times = mix(add ^ bh) | 1u;
  }

  // The factors of VL weights, of which either the query or the key may be the same for all.
  template <class K, class Q>
  VATTN_INLINE Vec factors(K key, Q times, Q add) const {
    VecUint bits = mix(VecUint{} + key * times + add) >> 8;
    return (Vec)((VecInt)splat(factor) & (VecInt)(bits >= VecUint{} + threshold));
  }
};

}  // namespace VATTN_ISA
}  // namespace vattn
