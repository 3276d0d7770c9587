// The CPU kernels for x86-64 with AVX-512 and AMX: those of AVX-512, but for bfloat16 attention on matrix tiles.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <initializer_list>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,prfchw,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")
#endif

#define VATTN_ISA amx
#define VATTN_VECTOR_BYTES 64
#include "axial_attention.h"
#include "edge_sparse_attention.h"
#include "flash_tiles.h"
#include "latent_attention.h"
#include "leap_attention.h"
#include "node_sparse_attention.h"

namespace vattn {

namespace avx512 { const Kernels& isa_kernels(); }

namespace amx {

// A kernel that runs `items` for bfloat16, and that of AVX-512 for other dtypes.
#define VATTN_TILES(kernel, ...)                                                                    \
  [](const Args& a, int64_t begin, int64_t end, float* workspace) {                                 \
    if (a.dtype != Dtype::BFloat16) return (avx512::isa_kernels().*of).kernel(a, begin, end, workspace); \
    const TilesInUse tiles;                                                                         \
    __VA_ARGS__(a, begin, end, workspace);                                                          \
  }

template <template <class> class Itinerary, class Args, AttentionKernels<Args> Kernels::*of>
AttentionKernels<Args> tile_kernels() {
  using OfTiles = Itinerary<BFloat16>;
  AttentionKernels<Args> kernels = avx512::isa_kernels().*of;
  kernels.forward = VATTN_TILES(forward, forward_tile_items<OfTiles>);
  if constexpr (OfTiles::SHARES_KEYS) {
    kernels.backward = VATTN_TILES(backward, backward_shared_items<OfTiles, TileBackwardWorkspace>);
  } else {
    kernels.backward = VATTN_TILES(backward, backward_items<OfTiles, TileBackwardWorkspace>);
    kernels.backward_query = VATTN_TILES(backward_query, backward_query_items<OfTiles, TileBackwardWorkspace>);
    kernels.backward_key = VATTN_TILES(backward_key, backward_key_items<OfTiles, TileBackwardWorkspace>);
  }
  return kernels;
}

static Kernels tiles() {
  Kernels kernels = avx512::isa_kernels();
  kernels.name = "amx";
  kernels.forward_workspace = [](int64_t head_dim, int64_t panels, int64_t keys) {
    int64_t vectors = avx512::isa_kernels().forward_workspace(head_dim, panels, keys);
    int64_t tiles = TileForwardWorkspace(head_dim, panels, nullptr).size;
    return tiles < vectors ? vectors : tiles;
  };
  kernels.backward_workspace = [](int64_t head_dim, int64_t chunk, int64_t queries, int64_t keys) {
    int64_t vectors = avx512::isa_kernels().backward_workspace(head_dim, chunk, queries, keys);
    int64_t tiles = TileBackwardWorkspace(head_dim, chunk, queries, keys, nullptr).size;
    return tiles < vectors ? vectors : tiles;
  };
  kernels.leap_attention = tile_kernels<LeapGroup, LeapAttention, &Kernels::leap_attention>();
  kernels.latent_attention = tile_kernels<LatentHead, LatentAttention, &Kernels::latent_attention>();
  kernels.edge_sparse_attention = tile_kernels<EdgeBlock, EdgeSparseAttention, &Kernels::edge_sparse_attention>();
  kernels.node_sparse_attention = tile_kernels<KeptKeys, NodeSparseAttention, &Kernels::node_sparse_attention>();
  kernels.axial_attention = tile_kernels<AxialLines, AxialAttention, &Kernels::axial_attention>();
  return kernels;
}

const Kernels& isa_kernels() {
  static const Kernels kernels = tiles();
  return kernels;
}

}  // namespace amx
}  // namespace vattn

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
