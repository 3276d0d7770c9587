// What the CPU kernels take and who provides them: plain structs, so that the files compiled for one instruction
// set see no PyTorch header. Strides count elements; the last axis is contiguous.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace vattn {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

enum class Dtype { Float32, BFloat16, Float16 };

// A tensor (B, H, tokens, D) by pointer and strides, whose tokens have up to three axes: (token), (frame, token), or
// (outer, line, inner) of a grid. The last of them is `inner`; strides of axes that an operator does not have are 0.
struct Strided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, outer = 0, middle = 0, inner = 0;
};

// The numbers of batches and heads, of query tokens and of key tokens, for dropout: those that they have in a larger
// call, of which this one is a part. Null where it is none, and counts from 0.
struct Numbers {
  const int64_t *heads = nullptr, *queries = nullptr, *keys = nullptr;
};

// What attention operators share. The graph of an operator splits into independent components: queries attend only to
// keys of their own. A component is the unit of work, and has an itinerary.
struct Attention {
  Dtype dtype;
  int64_t B, H, D;
  float scale, dropout_p;
  int64_t seed;
  Numbers numbers;
  Strided query, out;
  Strided grad_out, grad_query;        // backward only
  Strided query_tangent, out_tangent;  // forward-mode only
  float* lse;          // a number for each query, as have `delta` and `lse_tangent`
  float* delta;        // backward only; comes in as minus the gradient of lse, or 0
  float* lse_tangent;  // forward-mode only
  int64_t components, max_queries, max_keys;
  int64_t panels;  // of queries to an item of the forward and of the tangent
  int64_t chunk;   // of queries held at once by the backward
};

// Its keys and values: Strided, or something else where they lie in several tensors.
template <class Tensor>
struct KeyTensors {
  Tensor key, value;
  Tensor grad_key, grad_value;        // backward only
  Tensor key_tangent, value_tangent;  // forward-mode only
};

struct LeapAttention : Attention, KeyTensors<Strided> {
  int64_t T, N, leap, group_size, fold;

  int64_t groups() const {
    int64_t span = leap * group_size, rest = T % span;
    return T / span * leap + (rest < leap ? rest : leap);
  }
};

// Keys in segments that lie apart: a tensor for each.
struct LatentAttention : Attention, KeyTensors<const Strided*> {
  int64_t Lq;
  const int64_t* segment_ends;  // of each segment, the keys up to its end
  const int64_t* key_lengths;   // (B,), or null
  // Over `splits` ranges of the keys, what forward or tangent gives is float, and has a leading axis of that size.
  int64_t splits, split_out, split_lse;
};

// What the positions of G + N tokens do to their scores: a learned bias of differences (position_bias.h), causality.
struct Positions {
  int64_t G = 0;
  const float* table = nullptr;         // of head 0, in units of log2, turned around; null if there is no bias
  const float* table_tangent = nullptr;  // as the table lies, not in units of log2; null if there is none
  int64_t table_head = 0;               // from head to head
  int64_t differences = 0, middle = 0;  // entries of differences of codes, and the one of equal codes
  const int32_t* codes = nullptr;       // of the N tokens; `codes_batch` from sample to sample
  int64_t codes_batch = 0;
  const int32_t* causal = nullptr;  // the positions of the N tokens if no token reads a later one, else null
  int64_t causal_batch = 0;
};

// The components of a head share its keys: they are its units. Unit 0 is the global queries and reads all keys.
//
// With an order, a row of a tensor has a place besides: the global tokens come first, then those of block after block,
// without gaps.
struct EdgeSparseAttention : Attention, KeyTensors<Strided> {
  int64_t Lq, G, block_size, blocks;  // Lq = G + N
  const int32_t *row_offsets, *columns;
  int64_t layout_batch, layout_head;    // from sample to sample and from head to head of row_offsets; 0 where shared
  const int32_t* tokens = nullptr;      // (Lq), the token at each place; null without an order, as those below
  const int32_t* begins = nullptr;      // (blocks + 1), the places where blocks begin, and where the last one ends
  const int64_t* keys_before = nullptr;  // of each entry of columns, how many keys of blocks its row reads before
  Positions positions;
  float* importance;  // the scores (B, H, N) of the first global query, in units of log2, or null
  // Backward over `slices` shares of the units: gradients of keys then are float, and they and grad_bias have a
  // leading axis of that size. grad_bias has a table for each batch and head.
  int64_t slices, slice_grad;
  float* grad_bias;

  int64_t units() const { return blocks + 1; }
  int64_t begin(int64_t block) const { return begins ? begins[block] : G + block * block_size; }
  int64_t length(int64_t block) const {
    if (begins) return begins[block + 1] - begins[block];
    int64_t rest = Lq - G - block * block_size;
    return rest < block_size ? rest : block_size;
  }
};

// Lines along one axis of a grid, whose other axes lie outside and inside of it: tokens are (outer, line, inner).
struct AxialAttention : Attention, KeyTensors<Strided> {
  int64_t outer, line, inner;
  int64_t lines;  // of a component
};

struct NodeSparseAttention : Attention, KeyTensors<Strided> {
  int64_t Lq;
  const int64_t* kept;          // (B, max_keys): which keys are read
  const int64_t* kept_lengths;  // (B,): how many of a sample's entries are, or null
  bool compact;                 // the gradients are those of kept keys, in float, and not of all

  int64_t length(int64_t b) const { return kept_lengths ? kept_lengths[b] : max_keys; }
};

struct TokenImportance : Attention {
  int64_t Lq;
  Strided key;
  Positions positions;
  const int64_t* key_lengths;  // (B,), or null
  float *maximum, *sum;        // of the powers of 2 of a query (B, H, Lq), if no lse is given: exacter than that, their
                               // rounded logarithm
  float* importance;           // (B, max_keys)
};

struct PeriodicShift {
  Dtype dtype;
  int64_t B, H, T, N, D, fold;
  bool transpose;
  Strided x, out;
};

// A tensor of rows, by pointer and the strides of all axes but the last.
struct Rows {
  static constexpr int64_t MAX_AXES = 8;
  void* data = nullptr;
  int64_t strides[MAX_AXES] = {};
};

struct MergeAttention {
  static constexpr int64_t MAX_D = 256;
  Dtype dtype;
  int64_t parts, rows, D;
  int64_t axes, sizes[Rows::MAX_AXES];  // of which `rows` is the product
  const Rows* outs;
  const float* const* lses;  // each (rows), contiguous, like all numbers that belong to rows
  Rows out;
  float* lse;
  // Backward only; grad_lse may be null.
  Rows grad_out;
  const float* grad_lse;
  const Rows* grad_outs;
  float* const* grad_lses;
  // Tangent only.
  const Rows* out_tangents;
  const float* const* lse_tangents;
  Rows out_tangent;
  float* lse_tangent;
};

struct NearestCode {
  static constexpr int64_t MAX_AXES = Rows::MAX_AXES;
  Dtype dtype;  // of x and the codebook
  int64_t vectors, C, K;
  const void *x, *codebook;
  int64_t axes, sizes[MAX_AXES], steps[MAX_AXES];  // of x but for its channels; `vectors` is the product
  int64_t channel, code_step;                      // strides
  float *center, *half_squares;  // (C) and (K), for `center_codes` and `square_codes` to fill
  float longest, tolerance;  // the length of the longest code, and what a unit of length adds to the tolerance
  int64_t panels;            // of vectors to an item
  int64_t* index;            // (vectors)
};

// Kernels run items [begin, end) of their work, attention kernels in a workspace of floats of their own.
template <class Args>
struct AttentionKernels {
  using Kernel = void (*)(const Args&, int64_t begin, int64_t end, float* workspace);
  Kernel forward;         // items: panels of a component
  Kernel tangent;         // likewise
  Kernel delta;           // tiles of a component, or null as those below
  Kernel backward;        // components; where they share keys, (slice, b, h)
  Kernel backward_query;  // chunks of a component, or null where components share keys
  Kernel backward_key;    // tiles of a component, or null likewise
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  int64_t tile;       // queries in a panel, keys in a tile
  int64_t long_sum;   // terms of a score of nearest_code that are added up in one register
  int64_t (*forward_chunk)(int64_t head_dim);  // keys that the forward takes at once
  int64_t (*forward_workspace)(int64_t head_dim, int64_t panels, int64_t keys);
  int64_t (*backward_workspace)(int64_t head_dim, int64_t chunk, int64_t queries, int64_t keys);
  int64_t (*tangent_workspace)(int64_t head_dim, int64_t panels);
  AttentionKernels<LeapAttention> leap_attention;
  AttentionKernels<LatentAttention> latent_attention;
  AttentionKernels<EdgeSparseAttention> edge_sparse_attention;
  AttentionKernels<NodeSparseAttention> node_sparse_attention;
  AttentionKernels<TokenImportance>::Kernel token_importance_sums;  // panels of a component
  AttentionKernels<TokenImportance>::Kernel token_importance;       // tiles of keys of a sample
  AttentionKernels<AxialAttention> axial_attention;
  int64_t (*nearest_workspace)(int64_t channels, int64_t panels);
  void (*center_codes)(const NearestCode&, int64_t begin, int64_t end, float* workspace);  // items: channels
  void (*square_codes)(const NearestCode&, int64_t begin, int64_t end, float* workspace);  // items: codes
  void (*nearest_code)(const NearestCode&, int64_t begin, int64_t end, float* workspace);  // items: panels
  void (*periodic_shift)(const PeriodicShift&, int64_t begin, int64_t end);
  void (*merge_forward)(const MergeAttention&, int64_t begin, int64_t end);
  void (*merge_backward)(const MergeAttention&, int64_t begin, int64_t end);
  void (*merge_tangent)(const MergeAttention&, int64_t begin, int64_t end);
};

// Of every operator that is registered, by its name, the kinds of its arguments, such as "Tensor, int, float".
std::map<std::string, std::string>& signatures();

// All kernels that this processor runs, the fastest first.
std::vector<const Kernels*> available_kernels();

// The fastest of them, or those that VATTN_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace vattn
