// What the CPU kernels take and who provides them: plain structs, so that the files compiled for one instruction
// set see no PyTorch header. Strides count elements; the last axis is contiguous.
#pragma once

#include <cstdint>
#include <vector>

namespace vattn {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

enum class Dtype { Float32, BFloat16, Float16 };

// A video tensor (B, H, T, N, D), by pointer and strides. Null where an operator has none.
struct Video {
  void* data = nullptr;
  int64_t batch = 0, head = 0, frame = 0, token = 0;
};

struct LeapAttention {
  Dtype dtype;
  int64_t B, H, T, N, D, leap, group_size, fold;
  float scale, dropout_p;
  int64_t seed;
  Video query, key, value, out;
  float* lse;  // (B, H, T, N)
  // Backward only. `delta` (B, H, T, N) comes in as minus the gradient of lse, or 0.
  Video grad_out, grad_query, grad_key, grad_value;
  float* delta;
  int64_t panels;  // of queries to an item of the forward
  int64_t chunk;   // of queries held at once by the backward

  int64_t max_group() const { return (group_size < T ? group_size : T) * N; }
  int64_t groups() const {
    int64_t span = leap * group_size, rest = T % span;
    return T / span * leap + (rest < leap ? rest : leap);
  }
};

struct PeriodicShift {
  Dtype dtype;
  int64_t B, H, T, N, D, fold;
  bool transpose;
  Video x, out;
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
};

// The kernels of one instruction set. Each runs items [begin, end) of its work, in a workspace of its own.
struct Kernels {
  const char* name;
  int64_t tile;  // queries in a panel, keys in a tile
  int64_t (*forward_workspace)(int64_t head_dim, int64_t panels);
  int64_t (*backward_workspace)(int64_t head_dim, int64_t chunk, int64_t queries, int64_t keys);
  void (*leap_forward)(const LeapAttention&, int64_t begin, int64_t end, float* workspace);
  void (*leap_delta)(const LeapAttention&, int64_t begin, int64_t end, float* workspace);
  void (*leap_backward)(const LeapAttention&, int64_t begin, int64_t end, float* workspace);
  void (*leap_backward_query)(const LeapAttention&, int64_t begin, int64_t end, float* workspace);
  void (*leap_backward_key)(const LeapAttention&, int64_t begin, int64_t end, float* workspace);
  void (*periodic_shift)(const PeriodicShift&, int64_t begin, int64_t end);
  void (*merge_forward)(const MergeAttention&, int64_t begin, int64_t end);
  void (*merge_backward)(const MergeAttention&, int64_t begin, int64_t end);
};

// All kernels that this processor runs, the fastest first.
std::vector<const Kernels*> available_kernels();

// The fastest of them, or those that VATTN_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace vattn
