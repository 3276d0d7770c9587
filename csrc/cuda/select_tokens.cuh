// One kernel for the K most important tokens of each sample, in their old order: selection, compaction and gather.
//
//   importance   .1 .4 .2 .4 .3      K = 3
//   key          a uint32 that orders as the importance does, NaN last
//   threshold    the K-th largest key (.3), digit by digit; and how many of the keys equal to it stay, the first ones
//   rank          -  0  -  1  2      how many tokens stay before this one
//
// A block copies the rows of some ranks of one sample. Every block of a sample finds all ranks for itself: reading N
// numbers a few times from cache is cheaper than to wait for another block, as long as it copies no fewer bytes.
// Nothing depends on the order of threads, so that the result is the same every time.
#pragma once

#include <cstdint>

#include "select_tokens.h"

namespace vattn {

constexpr int SELECT_THREADS = 256;
constexpr int SELECT_ROWS = 1024;  // the most ranks of one block
constexpr int DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS;
constexpr int WARP = 32;

// Ascending with the importance: -inf < .. < -0 = 0 < .. < inf < NaN.
__device__ inline uint32_t key_of(float importance) {
  if (importance != importance) return 0xFFFFFFFFu;
  uint32_t bits = __float_as_uint(importance + 0.0f);  // -0 + 0 = 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The sum of `value` over the threads up to this one. All threads call it.
__device__ inline int inclusive_sum(int value, int* shared) {
  int t = (int)threadIdx.x;
  shared[t] = value;
  __syncthreads();
  for (int step = 1; step < SELECT_THREADS; step *= 2) {
    int before = t >= step ? shared[t - step] : 0;
    __syncthreads();
    shared[t] += before;
    __syncthreads();
  }
  int sum = shared[t];
  __syncthreads();
  return sum;
}

struct Threshold {
  uint32_t key;  // the K-th largest
  int ties;      // how many of the keys equal to it are among the K largest
};

// The K-th largest of the keys, K >= 1, by its digits from the highest one down. All threads call it.
__device__ inline Threshold find_threshold(const float* importance, int64_t step, int N, int K, int* counts,
                                           int* sums) {
  constexpr int OWN = DIGITS / SELECT_THREADS;
  __shared__ int found_digit, found_rest;
  uint32_t key = 0, known = 0;
  int rest = K;
  for (int shift = 32 - DIGIT_BITS; known != 0xFFFFFFFFu; shift = shift > DIGIT_BITS ? shift - DIGIT_BITS : 0) {
    for (int i = (int)threadIdx.x; i < DIGITS; i += SELECT_THREADS) counts[i] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < N; i += SELECT_THREADS) {
      uint32_t other = key_of(importance[i * step]);
      if ((other & known) == key) atomicAdd(&counts[(other >> shift) & (DIGITS - 1)], 1);
    }
    __syncthreads();
    // Thread t counts the digits from high - OWN + 1 to high, so that sums run from the largest down.
    int high = DIGITS - 1 - (int)threadIdx.x * OWN, own = 0;
    for (int i = 0; i < OWN; ++i) own += counts[high - i];
    int larger = inclusive_sum(own, sums) - own;
    if (larger < rest && rest <= larger + own) {
      int digit = high;
      while (larger + counts[digit] < rest) larger += counts[digit--];
      found_digit = digit, found_rest = rest - larger;
    }
    __syncthreads();
    key |= (uint32_t)found_digit << shift;
    known |= (uint32_t)(DIGITS - 1) << shift;
    rest = found_rest;
    __syncthreads();
  }
  return {key, rest};
}

// The tokens of ranks `first` .. `last` - 1, into chosen[rank - first]. All threads call it.
__device__ inline void choose(const float* importance, int64_t step, int N, Threshold threshold, int first, int last,
                              int* chosen, int* sums) {
  int each = (N + SELECT_THREADS - 1) / SELECT_THREADS;
  int begin = min((int)threadIdx.x * each, N), end = min(begin + each, N);
  int larger = 0, equal = 0;
  for (int i = begin; i < end; ++i) {
    uint32_t key = key_of(importance[i * step]);
    larger += key > threshold.key;
    equal += key == threshold.key;
  }
  int ties = max(0, min(equal, threshold.ties - (inclusive_sum(equal, sums) - equal)));
  int rank = inclusive_sum(larger + ties, sums) - (larger + ties);
  for (int i = begin; i < end && rank < last; ++i) {
    uint32_t key = key_of(importance[i * step]);
    bool stays = key > threshold.key || (key == threshold.key && ties-- > 0);
    if (stays && rank >= first) chosen[rank - first] = i;
    rank += stays;
  }
  __syncthreads();
}

// Grid: samples x parts of their G + K rows, `rows` to a block. Rows are copied in pieces of a Vector.
template <class Vector>
__global__ void __launch_bounds__(SELECT_THREADS) select_tokens_kernel(SelectTokens a, int rows, int parts) {
  __shared__ int chosen[SELECT_ROWS], counts[DIGITS], sums[SELECT_THREADS];
  int64_t b = blockIdx.x / parts;
  int64_t row = (int64_t)(blockIdx.x % parts) * rows, end = min(row + rows, a.G + a.K);
  int first = (int)max(row - a.G, (int64_t)0), last = (int)(end - a.G);  // ranks; none if last <= first
  if (first < last) {
    const float* importance = a.importance + b * a.importance_batch;
    Threshold threshold = find_threshold(importance, a.importance_step, (int)a.N, (int)a.K, counts, sums);
    choose(importance, a.importance_step, (int)a.N, threshold, first, last, chosen, sums);
  }
  for (int rank = first + (int)threadIdx.x; rank < last; rank += SELECT_THREADS) {
    int64_t index = chosen[rank - first];
    a.kept_index[b * a.K + rank] = index;
    a.kept_positions[b * a.K + rank] =
        a.positions == nullptr ? index : a.positions[b * a.positions_batch + index * a.positions_step];
  }
  int64_t vectors = a.row_bytes / (int64_t)sizeof(Vector);
  for (row += threadIdx.x / WARP; row < end; row += SELECT_THREADS / WARP) {
    int64_t from = row < a.G ? row : a.G + chosen[row - a.G - first];
    const Vector* source = (const Vector*)(a.tokens + b * a.tokens_batch + from * a.tokens_step);
    Vector* target = (Vector*)(a.kept_tokens + (b * (a.G + a.K) + row) * a.row_bytes);
    for (int64_t i = threadIdx.x % WARP; i < vectors; i += WARP) target[i] = source[i];
  }
}

}  // namespace vattn
