// The kernel of vattn::select_tokens on the host, for ctypes.
#include "cuda/select_tokens.cuh"

extern "C" void select_tokens(const vattn::SelectTokens* a, int rows, int bytes, bool descending) {
  int parts = (int)((a->G + a->K + rows - 1) / rows);
  auto run = [&](auto kernel) {
    on_host::launch(kernel, (unsigned)(a->B * parts), vattn::SELECT_THREADS, descending, *a, rows, parts);
  };
  if (bytes == 16) return run(vattn::select_tokens_kernel<uint4>);
  if (bytes == 4) return run(vattn::select_tokens_kernel<uint32_t>);
  run(vattn::select_tokens_kernel<uint16_t>);
}
