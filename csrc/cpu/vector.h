// Vectors of float, for whichever instruction set the including file is compiled.
//
// Written with the vector extensions that GCC and Clang share, so that one source serves every width: the
// including file sets VATTN_VECTOR_BYTES (64, 32 or 16) and the namespace VATTN_ISA. No standard header may be
// included below this point of a translation unit: its inline functions would be compiled for the wrong machine.
#pragma once

#include <cstdint>

#define VATTN_INLINE inline __attribute__((always_inline))

namespace vattn {
namespace VATTN_ISA {

constexpr int VL = VATTN_VECTOR_BYTES / 4;  // floats in a vector

typedef float Vec __attribute__((vector_size(VATTN_VECTOR_BYTES)));
typedef int32_t VecInt __attribute__((vector_size(VATTN_VECTOR_BYTES)));
typedef uint32_t VecUint __attribute__((vector_size(VATTN_VECTOR_BYTES)));
typedef uint16_t VecHalf __attribute__((vector_size(VATTN_VECTOR_BYTES / 2)));
typedef float VecLoose __attribute__((vector_size(VATTN_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t VecUintLoose __attribute__((vector_size(VATTN_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t VecHalfLoose __attribute__((vector_size(VATTN_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint16_t VecWholeLoose __attribute__((vector_size(VATTN_VECTOR_BYTES), aligned(2), may_alias));

constexpr double LOG2E_EXACT = 1.44269504088896340736;
constexpr float LOG2E = (float)LOG2E_EXACT;
constexpr float LN2 = 0.69314718055994530942f;
constexpr float INFINITE = __builtin_inff();

VATTN_INLINE constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
VATTN_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr bool is_float = false;
template <>
constexpr bool is_float<float> = true;
template <class T, class U>
constexpr bool is_same = false;
template <class T>
constexpr bool is_same<T, T> = true;

VATTN_INLINE Vec splat(float x) { return x - Vec{}; }
VATTN_INLINE Vec select(VecInt mask, Vec a, Vec b) { return (Vec)((mask & (VecInt)a) | (~mask & (VecInt)b)); }
// Where a is NaN, b.
#if defined(__aarch64__)
VATTN_INLINE Vec larger(Vec a, Vec b) { return (Vec)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b); }
#else
VATTN_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif

VATTN_INLINE Vec load(const float* p) { return *(const VecLoose*)p; }
VATTN_INLINE void store(float* p, Vec x) { *(VecLoose*)p = x; }
VATTN_INLINE VecUint load(const uint32_t* p) { return *(const VecUintLoose*)p; }

// Some lanes of a vector.
#if VATTN_VECTOR_BYTES == 64
typedef __mmask16 Mask;
VATTN_INLINE void include(Mask& mask, int64_t lane) { mask |= (Mask)(1 << lane); }
VATTN_INLINE Vec load(Mask mask, const float* p, Vec others) {
  return (Vec)_mm512_mask_loadu_ps((__m512)others, mask, p);
}
VATTN_INLINE Vec keep(Mask mask, Vec x) { return (Vec)_mm512_maskz_mov_ps(mask, (__m512)x); }
#else
typedef VecInt Mask;
VATTN_INLINE void include(Mask& mask, int64_t lane) { mask[lane] = -1; }
VATTN_INLINE Vec load(Mask mask, const float* p, Vec others) { return select(mask, load(p), others); }
VATTN_INLINE Vec keep(Mask mask, Vec x) { return select(mask, x, Vec{}); }
#endif

// The bits of VL numbers of 16 bits.
template <class T>
VATTN_INLINE VecUint widened(const T* p) {
  VecHalf bits = *(const VecHalfLoose*)p;
#if VATTN_VECTOR_BYTES == 64
  return (VecUint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);  // GCC 12 would convert them by halves
#elif defined(__aarch64__)
  return (VecUint)vmovl_u16((uint16x4_t)bits);  // of a conversion of the language GCC 12 makes one of each lane
#else
  return __builtin_convertvector(bits, VecUint);
#endif
}

// bfloat16 is the upper half of a float; it is rounded to nearest even.
VATTN_INLINE Vec load(const BFloat16* p) { return (Vec)(widened(p) << 16); }
VATTN_INLINE void store(BFloat16* p, Vec x) {
  VecUint bits = (VecUint)x;
  VecUint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  VecUint quiet = (bits >> 16) | 0x40;  // rounding must not turn a NaN into an infinity
#if VATTN_VECTOR_BYTES == 64
  const Mask nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  _mm512_mask_cvtepi32_storeu_epi16(p, 0xffff, _mm512_mask_mov_epi32((__m512i)rounded, nan, (__m512i)quiet));
#else
  VecUint nan = (VecUint)(x != x);
  *(VecHalfLoose*)p = __builtin_convertvector((nan & quiet) | (~nan & rounded), VecHalf);
#endif
}

#if VATTN_VECTOR_BYTES == 64
VATTN_INLINE Vec load(const Float16* p) {
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));  // the plain form warns in GCC 12
}
VATTN_INLINE void store(Float16* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif VATTN_VECTOR_BYTES == 32
VATTN_INLINE Vec load(const Float16* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
VATTN_INLINE void store(Float16* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
VATTN_INLINE Vec load(const Float16* p) { return (Vec)vcvt_f32_f16((float16x4_t)(VecHalf)*(const VecHalfLoose*)p); }
VATTN_INLINE void store(Float16* p, Vec x) { *(VecHalfLoose*)p = (VecHalf)vcvt_f16_f32((float32x4_t)x); }
#else
// In the bits that those instructions give, whether or not the processor takes subnormal floats for 0. Additions round
// the numbers between 0 and 2^-14, since 2^-24 is the last place of 0.5.
VATTN_INLINE Vec load(const Float16* p) {
  VecUint bits = widened(p), sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  Vec small = (Vec)(magnitude | 0x3f000000) - 0.5f;
  Vec large = (Vec)((magnitude << 13) + 0x70000000) * 0x1p-112f;  // infinities and NaN keep the largest exponent
  return (Vec)(sign | (VecUint)select((VecInt)magnitude < 0x400, small, large));
}
VATTN_INLINE void store(Float16* p, Vec x) {
  VecUint bits = (VecUint)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  VecUint small = (VecUint)((Vec)magnitude + 0.5f) - 0x3f000000;
  VecUint finite = (VecUint)((Vec)magnitude < 65536.f ? (Vec)magnitude : splat(65536.f));  // which is an infinity
  VecUint large = (finite - 0x38000000 + 0xfff + ((finite >> 13) & 1)) >> 13;
  VecUint nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  VecInt is_small = (VecInt)((Vec)magnitude < 0x1p-14f), is_nan = (VecInt)(x != x);
  VecUint half = (VecUint)select(is_nan, (Vec)nan, select(is_small, (Vec)small, (Vec)large));
  *(VecHalfLoose*)p = __builtin_convertvector(sign | half, VecHalf);
}
#endif

// dst[0:n] = src[0:n], of 16 bits each. The last vector overlaps the one before it, so that no n needs a mask.
template <class T>
VATTN_INLINE void copy_bits(T* dst, const T* src, int64_t n) {
  static_assert(sizeof(T) == 2);
  constexpr int64_t WHOLE = 2 * VL;
  auto copy_half = [=](int64_t i) { *(VecHalfLoose*)(dst + i) = *(const VecHalfLoose*)(src + i); };
  auto copy_whole = [=](int64_t i) { *(VecWholeLoose*)(dst + i) = *(const VecWholeLoose*)(src + i); };
  if (n >= WHOLE) {
    for (int64_t i = 0; i + WHOLE <= n; i += WHOLE) copy_whole(i);
    if (n % WHOLE) copy_whole(n - WHOLE);
  } else if (n >= VL) {
    copy_half(0), copy_half(n - VL);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
  }
}

// dst[0:n] = times * src[0:n], converting.
template <class To, class From>
VATTN_INLINE void copy(To* dst, const From* src, int64_t n, float times = 1.f) {
  if constexpr (is_same<To, From> && !is_float<To>)
    if (times == 1) return copy_bits(dst, src, n);
  if (n >= VL) {
    for (int64_t i = 0; i + VL <= n; i += VL) store(dst + i, times * load(src + i));
    if (n % VL) store(dst + n - VL, times * load(src + n - VL));
    return;
  }
  From padded[VL] = {};
  To converted[VL];
  for (int64_t i = 0; i < n; ++i) padded[i] = src[i];
  store(converted, times * load(padded));
  for (int64_t i = 0; i < n; ++i) dst[i] = converted[i];
}

template <class T>
VATTN_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

template <class T>
VATTN_INLINE void prefetch_to_write(T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i, 1, 2);
}

template <class To>
VATTN_INLINE void zero(To* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = To{};
}

// The last vector of a row of `ld` numbers, before others fill all of it that they have.
template <class T>
VATTN_INLINE void zero_end(T* row, int64_t ld) {
  store((float*)(row + ld) - VL, Vec{});
}

// Whether n numbers, whole vectors, are finite.
inline bool all_finite(const float* x, int64_t n) {
  constexpr int AT_ONCE = 4;
  Vec sums[AT_ONCE] = {};
  int64_t i = 0;
  for (; i + AT_ONCE * VL <= n; i += AT_ONCE * VL)
#pragma GCC unroll 4
    for (int s = 0; s < AT_ONCE; ++s) sums[s] += 0 * load(x + i + s * VL);  // of NaN and of infinities, NaN
  for (; i < n; i += VL) sums[0] += 0 * load(x + i);
  const Vec sum = sums[0] + sums[1] + sums[2] + sums[3];
  bool finite = true;
  for (int l = 0; l < VL; ++l) finite &= sum[l] == 0;
  return finite;
}

// 2^f for f in [-1/2, 1/2]: a minimax polynomial of relative error 2e-9.
VATTN_INLINE Vec exp2_of_fraction(Vec f) {
  Vec p = splat(1.534581216e-4f);
  p = p * f + 1.339993118e-3f;
  p = p * f + 9.618488956e-3f;
  p = p * f + 5.550328777e-2f;
  p = p * f + 2.402264689e-1f;
  p = p * f + 6.931472057e-1f;
  return p * f + 1.0f;
}

// 2^x for x <= 0 to about one unit in the last place; below the normal numbers, and for -inf, exactly 0. Of NaN, NaN.
#if VATTN_VECTOR_BYTES == 64
VATTN_INLINE Vec exp2(Vec x) {
  constexpr float SHIFT = 12582912.f;  // 1.5 * 2^23: beyond it floats are integers
  const Vec whole = x + SHIFT - SHIFT, p = exp2_of_fraction(x - whole);
  const Mask normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.f), _CMP_NLE_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)whole);
}
#else
// The integer nearest to each number. Of what is not finite, or too large, the lowest nine bits are 0.
#if VATTN_VECTOR_BYTES == 32
VATTN_INLINE VecInt nearest(Vec x) { return (VecInt)_mm256_cvtps_epi32((__m256)x); }
#elif defined(__aarch64__)
VATTN_INLINE VecInt nearest(Vec x) {
  return (VecInt)vcvtnq_s32_f32(vminq_f32((float32x4_t)x, vdupq_n_f32(0x1p30f)));  // or it saturates at 2^31 - 1
}
#else
VATTN_INLINE VecInt nearest(Vec x) {
  VecInt shifted = (VecInt)(x + 12582912.f);  // 1.5 * 2^23: the integer lands in the low bits
  return (shifted - 0x4b400000) & (VecInt)((x < 4194304.f) & (x > -4194304.f));
}
#endif
VATTN_INLINE Vec exp2(Vec x) {
  const VecInt whole = nearest(x);
  const Vec p = exp2_of_fraction(x - __builtin_convertvector(whole, Vec));
  const VecInt scaled = (VecInt)p + (whole << 23);  // to the bits of a NaN nothing is added
  return select((VecInt)(x <= -126.f), Vec{}, (Vec)scaled);
}
#endif

// Which lanes of two vectors, one behind the other, a step of a transpose or a sum takes: constants, or GCC builds them
// anew.
struct Lanes {
  alignas(VATTN_VECTOR_BYTES) int32_t upper[VL], lower[VL], turned[VL];
  constexpr Lanes(int half) : upper{}, lower{}, turned{} {
    for (int l = 0; l < VL; ++l) {
      upper[l] = l & half ? VL + l - half : l;
      lower[l] = l & half ? VL + l : l + half;
      turned[l] = l ^ half;
    }
  }
};
template <int HALF>
constexpr Lanes LANES{HALF};

VATTN_INLINE Vec shuffle(Vec a, Vec b, const int32_t* lanes) {
#if defined(__clang__)
  Vec result;
  for (int l = 0; l < VL; ++l) result[l] = lanes[l] < VL ? a[lanes[l]] : b[lanes[l] - VL];
  return result;
#else
  return __builtin_shuffle(a, b, *(const VecInt*)lanes);
#endif
}

// Lane l of the result is lane l - by, or 0 where there is none: -VL <= by < VL.
#if defined(__aarch64__)
VATTN_INLINE Vec moved_up(Vec x, int32_t by) {
  const uint8x16_t bytes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (Vec)vqtbl1q_u8((uint8x16_t)x, bytes - (uint8_t)(4 * by));  // of bytes that x does not have, 0
}
#else
VATTN_INLINE Vec moved_up(Vec x, int32_t by) {
  VecInt from;
#pragma GCC unroll 16
  for (int l = 0; l < VL; ++l) from[l] = l;
  from -= by;
#if defined(__clang__)
  Vec result{};
  for (int l = 0; l < VL; ++l)
    if (0 <= from[l] && from[l] < VL) result[l] = x[from[l]];
  return result;
#else
  return __builtin_shuffle(x, Vec{}, from);  // which takes indices modulo 2 VL
#endif
}
#endif

// Of the lanes of a vector, by halves.
template <int HALF = VL / 2, class Combine>
VATTN_INLINE float across(Vec x, Combine combine) {
  if constexpr (HALF == 0)
    return x[0];
  else
    return across<HALF / 2>(combine(x, shuffle(x, x, LANES<HALF>.turned)), combine);
}
VATTN_INLINE float largest(Vec x) {
  return across(x, [](auto a, auto b) { return larger(a, b); });
}
VATTN_INLINE float total(Vec x) {
  return across(x, [](auto a, auto b) { return a + b; });
}

// Transposes a VL x VL block: rows of `src` (ld_src apart) become columns of `dst` (rows ld_dst apart).
template <int HALF>
VATTN_INLINE void exchange(Vec (&row)[VL]) {
  if constexpr (HALF > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      if (i & HALF) continue;
      Vec a = row[i], b = row[i + HALF];
      row[i] = shuffle(a, b, LANES<HALF>.upper);
      row[i + HALF] = shuffle(a, b, LANES<HALF>.lower);
    }
    exchange<HALF / 2>(row);
  }
}
VATTN_INLINE void transpose_block(float* dst, int64_t ld_dst, const float* src, int64_t ld_src) {
  Vec row[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) row[i] = load(src + i * ld_src);
  exchange<VL / 2>(row);
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) store(dst + i * ld_dst, row[i]);
}

// dst (columns x rows) = transpose of src (rows x columns); both are padded to whole blocks.
inline void transpose(float* dst, int64_t ld_dst, const float* src, int64_t ld_src, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += VL)
    for (int64_t j = 0; j < columns; j += VL)
      transpose_block(dst + j * ld_dst + i, ld_dst, src + i * ld_src + j, ld_src);
}

}  // namespace VATTN_ISA
}  // namespace vattn
