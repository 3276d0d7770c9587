// Selection of tokens on a GPU: what the torch side hands to the kernel. Free of torch, so that nvcc alone compiles it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vattn {

struct SelectTokens {
  int64_t B, G, N, K;  // of each of B samples: G global tokens, then N others, of which K are kept

  const char* tokens;  // (B, G+N) rows of `row_bytes`
  int64_t tokens_batch, tokens_step;  // in bytes
  int64_t row_bytes;

  const float* importance;  // (B, N)
  int64_t importance_batch, importance_step;

  const int64_t* positions;  // (B, N), or null for 0 .. N-1
  int64_t positions_batch, positions_step;

  char* kept_tokens;  // (B, G+K) rows of `row_bytes`
  int64_t* kept_positions;  // (B, K)
  int64_t* kept_index;  // (B, K), ascending
};

// Queues the one kernel on `stream`.
cudaError_t select_tokens(const SelectTokens& a, cudaStream_t stream);

}  // namespace vattn
