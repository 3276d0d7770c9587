// Launches the kernel of vattn::select_tokens.
#include "select_tokens.cuh"

#include <algorithm>

namespace vattn {
namespace {

// A block reads the importances some six times, and should copy as many bytes.
int rows_of_block(const SelectTokens& a) {
  int64_t worth = 6 * (int64_t)sizeof(float) * a.N / std::max<int64_t>(1, 2 * a.row_bytes);
  return (int)std::clamp<int64_t>(worth, 32, SELECT_ROWS);
}

template <class Vector>
cudaError_t launch(const SelectTokens& a, cudaStream_t stream) {
  int rows = rows_of_block(a);
  int64_t parts = (a.G + a.K + rows - 1) / rows;
  if (a.B * parts == 0) return cudaSuccess;
  select_tokens_kernel<Vector><<<(unsigned)(a.B * parts), SELECT_THREADS, 0, stream>>>(a, rows, (int)parts);
  return cudaGetLastError();
}

// Whether every row starts and ends between vectors of `bytes`.
bool fits(const SelectTokens& a, int64_t bytes) {
  return ((int64_t)a.tokens | (int64_t)a.kept_tokens | a.tokens_batch | a.tokens_step | a.row_bytes) % bytes == 0;
}

}  // namespace

cudaError_t select_tokens(const SelectTokens& a, cudaStream_t stream) {
  if (fits(a, 16)) return launch<uint4>(a, stream);
  if (fits(a, 4)) return launch<uint32_t>(a, stream);
  return launch<uint16_t>(a, stream);
}

}  // namespace vattn
