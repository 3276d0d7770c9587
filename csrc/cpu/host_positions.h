// From a table of biases, a window and positions to what the kernels read of them.
#pragma once

#include "host.h"

namespace vattn {

class HostPositions {
  static constexpr int64_t PAD = 32;  // floats before and after a table, which vectors at its ends read or write
  at::Tensor causal, codes, table, table_tangent;

  // The position of each of N tokens, (N,) or (B, N), checked.
  static at::Tensor checked(const char* op, const at::Tensor& positions, int64_t B, int64_t N, int64_t cells) {
    at::Tensor p = positions.to(at::kLong).contiguous();
    TORCH_CHECK_VALUE((p.dim() == 1 && p.size(0) == N) || (p.dim() == 2 && p.size(0) == B && p.size(1) == N), op,
                      ": positions must have shape (", N, ",) or (", B, ", ", N, "), got ", p.sizes());
    const int64_t* at = p.data_ptr<int64_t>();
    for (int64_t i = 0; i < p.numel(); ++i)
      TORCH_CHECK_VALUE(0 <= at[i] && at[i] < cells, op, ": positions must be from 0 to below ", cells,
                        ", got a position of ", at[i]);
    return p;
  }

  // The table (R, H) as (H, R), its differences turned around.
  at::Tensor turned(const at::Tensor& bias, float times) const {
    const int64_t H = bias.size(1), differences = args.differences, table_head = args.table_head;
    at::Tensor result = at::empty({H, table_head}, at::kFloat), from = bias.to(at::kFloat).contiguous();
    const float* entry = from.data_ptr<float>();
    float* row = result.data_ptr<float>() + PAD;
    at::parallel_for(0, bias.size(0), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t to = i < differences ? differences - 1 - i : i;
        for (int64_t h = 0; h < H; ++h) row[h * table_head + to] = times * entry[i * H + h];
      }
    });
    return result;
  }

 public:
  Positions args;

  HostPositions(const char* op, int64_t B, int64_t H, int64_t N, int64_t num_global,
                const std::optional<at::Tensor>& bias, at::IntArrayRef window,
                const std::optional<at::Tensor>& positions, bool is_causal) {
    args.G = num_global;
    if (!bias.has_value() && !is_causal) return;
    TORCH_CHECK_VALUE(!bias.has_value() || window.size() == 3, op, ": a bias needs a window of three sizes");
    int64_t cells = bias.has_value() ? window[0] * window[1] * window[2] : INT32_MAX;
    at::Tensor place = checked(op, positions.has_value() ? *positions : at::arange(N, at::kLong), B, N, cells);
    int64_t batch = place.dim() == 2 ? N : 0;
    if (is_causal) {
      causal = place.to(at::kInt);
      args.causal = causal.data_ptr<int32_t>(), args.causal_batch = batch;
    }
    if (!bias.has_value()) return;
    const int64_t h = 2 * window[1] - 1, w = 2 * window[2] - 1;
    args.differences = (2 * window[0] - 1) * h * w, args.middle = args.differences / 2;
    const int64_t entries = args.differences + 2 * num_global + num_global * num_global;
    TORCH_CHECK_VALUE(bias->dim() == 2 && bias->size(0) == entries && bias->size(1) == H, op,
                      ": the bias table must have shape (", entries, ", ", H, "), got ", bias->sizes());
    args.table_head = entries + 2 * PAD;
    constexpr float LOG2E = 1.44269504088896340736f;
    table = turned(*bias, LOG2E), args.table = table.data_ptr<float>() + PAD;
    codes = at::empty(place.sizes(), at::kInt);
    args.codes = codes.data_ptr<int32_t>(), args.codes_batch = batch;
    const int64_t* from = place.data_ptr<int64_t>();
    int32_t* to = codes.data_ptr<int32_t>();
    for (int64_t i = 0; i < place.numel(); ++i) {
      int64_t x = from[i] % window[2], y = from[i] / window[2] % window[1], t = from[i] / window[2] / window[1];
      to[i] = (int32_t)((t * h + y) * w + x);
    }
  }
  HostPositions(const HostPositions&) = delete;  // `args` points to the tensors

  // Adds the tangent of the table, of whose shape it must be.
  void set_tangent(const at::Tensor& tangent) {
    table_tangent = turned(tangent, 1), args.table_tangent = table_tangent.data_ptr<float>() + PAD;
  }

  // Zeros for the gradients of `tables` tables, and where the first begins.
  at::Tensor start_grads(int64_t tables) const { return at::zeros({tables, args.table_head}, at::kFloat); }
  static float* first(const at::Tensor& grads) { return grads.data_ptr<float>() + PAD; }

  // The gradient (R, H) of the table, from those of the reversed table of each of (any, H).
  at::Tensor finish_grads(const at::Tensor& grads, int64_t H) const {
    at::Tensor sum = grads.view({H > 0 ? grads.size(0) / H : 0, H, args.table_head}).sum(0).narrow(1, PAD, args.table_head - 2 * PAD);
    at::Tensor differences = sum.narrow(1, 0, args.differences);
    differences.copy_(differences.flip(1));
    return sum.t().contiguous();
  }
};

}  // namespace vattn
