// Checks csrc/cpu/vector.h and gemm.h as they are compiled for one instruction set: VATTN_VECTOR_BYTES is set from
// outside. Says what is wrong, if anything is. Needs neither Python nor PyTorch, so that any processor can run it.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#define VATTN_ISA tested
#include "gemm.h"

using namespace vattn;
using namespace vattn::tested;

static int failures = 0;

#define CHECK(holds, ...)                                                \
  do {                                                                   \
    if (!(holds) && ++failures <= 20) {                                  \
      std::printf("line %d: " #holds ", not with ", __LINE__), std::printf(__VA_ARGS__), std::printf("\n"); \
    }                                                                    \
  } while (0)

static uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
static float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Numbers of 16 bits, by their definition.
struct Format {
  int fraction, least_exponent;  // bits of the fraction, and the exponent of the least normal number
  bool quiets;                   // a signalling NaN that is loaded

  uint32_t infinity() const { return 0x7fffu >> fraction << fraction; }

  uint32_t load(uint32_t half) const {
    const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff, rest = magnitude & ((1u << fraction) - 1);
    if (magnitude > infinity()) return sign | 0x7f800000 | rest << (23 - fraction) | (quiets ? 0x400000 : 0);
    if (magnitude == infinity()) return sign | 0x7f800000;
    const int exponent = (int)(magnitude >> fraction);
    const double digits = exponent ? rest + (1 << fraction) : rest;
    return sign | bits_of((float)std::ldexp(digits, least_exponent - fraction + (exponent ? exponent - 1 : 0)));
  }

  uint32_t store(uint32_t bits) const {
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const uint32_t upper = magnitude >> (23 - fraction) & 0x7fff;
    if (magnitude > 0x7f800000) return sign | infinity() | 1u << (fraction - 1) | upper;
    if (magnitude == 0x7f800000) return sign | infinity();
    const double x = float_of(magnitude);
    const int exponent = x == 0 ? least_exponent : std::max(std::ilogb(x), least_exponent);
    const double digits = std::nearbyint(std::ldexp(x, fraction - exponent));
    const double half = digits + std::ldexp(exponent - least_exponent, fraction);
    return sign | (half < infinity() ? (uint32_t)half : infinity());
  }
};
constexpr Format FLOAT16{10, -14, true}, BFLOAT16{7, -126, false};

// `expected` is found before subnormal floats are taken for 0.
static std::vector<uint32_t> all_loads(Format format) {
  std::vector<uint32_t> expected(0x10000);
  for (uint32_t half = 0; half < 0x10000; ++half) expected[half] = format.load(half);
  return expected;
}

template <class T>
static void check_loads(const std::vector<uint32_t>& expected) {
  for (uint32_t first = 0; first < 0x10000; first += VL) {
    T from[VL];
    float to[VL];
    for (int l = 0; l < VL; ++l) from[l].bits = (uint16_t)(first + l);
    store(to, load(from));
    for (int l = 0; l < VL; ++l)
      CHECK(bits_of(to[l]) == expected[first + l], "%04x: %08x", first + l, bits_of(to[l]));
  }
}

template <class T>
static void check_stores(Format format) {
  std::vector<uint32_t> all;
  for (uint32_t half = 0; half < 0x10000; ++half) {  // numbers, middles between neighbours, and what is next to them
    const uint32_t x = format.load(half), step = 1u << (23 - format.fraction), middle = x + step / 2;
    for (uint32_t bits : {x, x + 1, x - 1, middle - 1, middle, middle + 1}) all.push_back(bits);
    const float y = float_of(format.load((half & 0x7fff) < format.infinity() ? half + 1 : half));
    const float between = (float)(((double)float_of(x) + y) / 2);  // those of subnormals
    for (uint32_t bits : {bits_of(between) - 1, bits_of(between), bits_of(between) + 1}) all.push_back(bits);
  }
  for (uint32_t i = 0, bits = 0; i < 1 << 18; ++i) all.push_back(bits += 0x9e3779b1);
  while (all.size() % VL) all.push_back(0);
  for (size_t first = 0; first < all.size(); first += VL) {
    float from[VL];
    T to[VL];
    std::memcpy(from, &all[first], sizeof from);
    store(to, load(from));
    for (int l = 0; l < VL; ++l) {
      const uint32_t bits = all[first + l];
      CHECK(to[l].bits == format.store(bits), "%08x: %04x", bits, to[l].bits);
    }
  }
}

// As torch.set_flush_denormal does.
static void flush_subnormals(bool flush) {
#if defined(__x86_64__)
  _mm_setcsr(flush ? _mm_getcsr() | 0x8040 : _mm_getcsr() & ~0x8040u);
#elif defined(__aarch64__)
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" ::"r"(flush ? control | 1 << 24 : control & ~(1ull << 24)));
#else
  (void)flush;
#endif
}

static void check_conversions() {
  const std::vector<uint32_t> float16 = all_loads(FLOAT16), bfloat16 = all_loads(BFLOAT16);
  for (bool flush : {false, true}) {
    flush_subnormals(flush);
    check_loads<Float16>(float16);
    check_loads<BFloat16>(bfloat16);
    check_stores<Float16>(FLOAT16);
    flush_subnormals(false);
  }
  check_stores<BFloat16>(BFLOAT16);
}

static void check_exp2() {
  double worst = 0;
  for (int i = 0; i < 1 << 20; ++i) {
    const float x = -128.f * i / (1 << 20);
    const float power = exp2(splat(x))[VL - 1];
    if (x <= -126) CHECK(power == 0, "%g: %g", x, power);
    else worst = std::max(worst, std::abs(power / std::exp2((double)x) - 1));
  }
  CHECK(worst < 1.2e-7, "%g", worst);
  const float nan = std::numeric_limits<float>::quiet_NaN(), most = std::numeric_limits<float>::max();
  const float with_payload = __builtin_nanf("0x3fffff");
  for (float x : {-126.f, -1e3f, -1e9f, -1e10f, -most, -INFINITE}) CHECK(exp2(splat(x))[0] == 0, "%g", x);
  for (float x : {nan, -nan, with_payload, -with_payload}) CHECK(std::isnan(exp2(splat(x))[0]), "%g", x);
}

static void check_lanes() {
  float x[3 * VL], y[VL];
  for (int i = 0; i < 3 * VL; ++i) x[i] = (float)(i * 37 % 101) - 50;
  x[VL + 1] = 100;
  for (int by = -VL; by < VL; ++by) {
    store(y, moved_up(load(x + VL), by));
    for (int l = 0; l < VL; ++l)
      CHECK(y[l] == (0 <= l - by && l - by < VL ? x[VL + l - by] : 0), "%d, lane %d: %g", by, l, y[l]);
  }
  for (int first = 0; first <= 2 * VL; ++first) {
    float most = x[first], sum = 0;
    for (int l = 0; l < VL; ++l) most = std::fmax(most, x[first + l]), sum += x[first + l];
    CHECK(largest(load(x + first)) == most, "%d: %g", first, largest(load(x + first)));
    CHECK(total(load(x + first)) == sum, "%d: %g", first, total(load(x + first)));  // of integers
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(larger(splat(nan), splat(-1))[0] == -1, "%g", larger(splat(nan), splat(-1))[0]);
  for (int lane = 0; lane < VL; ++lane) {
    Mask mask{};
    include(mask, lane);
    store(y, load(mask, x, load(x + VL)));
    for (int l = 0; l < VL; ++l) CHECK(y[l] == x[l == lane ? l : VL + l], "%d, lane %d: %g", lane, l, y[l]);
    store(y, keep(mask, load(x + VL)));
    for (int l = 0; l < VL; ++l) CHECK(y[l] == (l == lane ? x[VL + l] : 0), "%d, lane %d: %g", lane, l, y[l]);
    for (float other : {nan, INFINITE, -INFINITE}) {
      CHECK(all_finite(x, 3 * VL), "%d", lane);
      float last = x[2 * VL + lane];
      x[2 * VL + lane] = other;
      CHECK(!all_finite(x, 3 * VL), "%d, %g", lane, other);
      x[2 * VL + lane] = last;
    }
  }
  constexpr int ROWS = 2 * VL, COLUMNS = 3 * VL;
  std::vector<float> from(ROWS * (COLUMNS + 1)), to(COLUMNS * (ROWS + 2));
  for (size_t i = 0; i < from.size(); ++i) from[i] = (float)i;
  transpose(to.data(), ROWS + 2, from.data(), COLUMNS + 1, ROWS, COLUMNS);
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j)
      CHECK(to[j * (ROWS + 2) + i] == from[i * (COLUMNS + 1) + j], "%d, %d: %g", i, j, to[j * (ROWS + 2) + i]);
}

template <class T>
static void check_copies() {
  for (int n = 0; n < 3 * VL; ++n) {
    float from[3 * VL], back[3 * VL + 1];
    T there[3 * VL + 1] = {};
    for (int i = 0; i < n; ++i) from[i] = (float)(i - 3);
    back[n] = 7;
    copy(there, (const float*)from, n, 0.5f);
    copy(back, (const T*)there, n, 2);
    for (int i = 0; i < n; ++i) CHECK(back[i] == from[i], "%d of %d: %g", i, n, back[i]);
    const T none{};
    CHECK(std::memcmp(there + n, &none, sizeof none) == 0 && back[n] == 7, "%d", n);
  }
}

static void check_products() {
  constexpr int MOST = 33;
  for (int m : {1, 2, 5, 6, 7, 13, 14, 20, 24, 27, MOST})
    for (int vectors = 1; vectors <= 9; ++vectors)
      for (int r : {1, 7, 70})
        for (bool turned : {false, true}) {
          const int n = vectors * VL, ldb = n + 3, ldc = n + 1;
          std::vector<float> a(MOST * 71), b(r * ldb), c(m * ldc), before(m * ldc);
          for (size_t i = 0; i < a.size(); ++i) a[i] = (float)(int)(i * 7 % 19) - 9;
          for (size_t i = 0; i < b.size(); ++i) b[i] = (float)(int)(i * 5 % 23) - 11;
          for (size_t i = 0; i < c.size(); ++i) c[i] = before[i] = (float)(int)i;
          const Matrix matrix{a.data(), turned ? 1 : 71, turned ? MOST : 1};
          multiply(turned, m, n, r, matrix, b.data(), ldb, c.data(), ldc);
          for (int i = 0; i < m; ++i)
            for (int j = 0; j < ldc; ++j) {
              float expected = turned || j >= n ? before[i * ldc + j] : 0;
              for (int p = 0; p < r && j < n; ++p)
                expected += a[i * matrix.row + p * matrix.column] * b[p * ldb + j];  // of integers
              CHECK(c[i * ldc + j] == expected, "%d x %d x %d at %d, %d: %g", m, n, r, i, j, c[i * ldc + j]);
            }
        }
}

int main() {
  check_conversions();
  check_exp2();
  check_lanes();
  check_copies<float>();
  check_copies<BFloat16>();
  check_copies<Float16>();
  check_products();
  if (failures) std::printf("%d failures\n", failures);
  return failures > 0;
}
