// From a table of biases, a window and positions to what the kernels read of them.
#pragma once

#include "host.h"

namespace vattn {

class HostPositions {
  static constexpr int64_t PAD = 32;  // floats before and after a table, which vectors at its ends read or write
  std::vector<int32_t> causal, codes;
  Tensor table, table_tangent;

  // The position of each of N tokens, (N,) or (B, N), checked; default 0 .. N-1.
  static std::vector<int64_t> checked(const char* op, const MaybeTensor& positions, int64_t B, int64_t N,
                                      int64_t cells) {
    std::vector<int64_t> place;
    if (!positions.has_value()) {
      for (int64_t i = 0; i < N; ++i) place.push_back(i);
    } else {
      Tensor x = contiguous(*positions, ScalarType::Long);
      check_value((x.dim() == 1 && x.size(0) == N) || (x.dim() == 2 && x.size(0) == B && x.size(1) == N), op,
                  ": positions must have shape (", N, ",) or (", B, ", ", N, "), got ", x.sizes());
      place.assign(x.const_data_ptr<int64_t>(), x.const_data_ptr<int64_t>() + x.numel());
    }
    for (int64_t at : place)
      check_value(0 <= at && at < cells, op, ": positions must be from 0 to below ", cells, ", got a position of ", at);
    return place;
  }

  // Where entry i of a table is once its differences are turned around, and back.
  int64_t turned(int64_t i) const { return i < args.differences ? args.differences - 1 - i : i; }

  // The table (R, H) as (H, R), turned around.
  Tensor turned(const Tensor& bias, float times) const {
    const int64_t H = bias.size(1), table_head = args.table_head;
    Tensor result = empty({H, table_head}, ScalarType::Float), from = contiguous(bias, ScalarType::Float);
    const float* entry = floats(from);
    float* row = floats(result) + PAD;
    torch::stable::parallel_for(0, bias.size(0), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t h = 0; h < H; ++h) row[h * table_head + turned(i)] = times * entry[i * H + h];
    });
    return result;
  }

 public:
  Positions args;

  HostPositions(const char* op, int64_t B, int64_t H, int64_t N, int64_t num_global, const MaybeTensor& bias,
                const std::vector<int64_t>& window, const MaybeTensor& positions, bool is_causal) {
    args.G = num_global;
    if (!bias.has_value() && !is_causal) return;
    check_value(!bias.has_value() || window.size() == 3, op, ": a bias needs a window of three sizes");
    const int64_t cells = bias.has_value() ? window[0] * window[1] * window[2] : INT32_MAX;
    const std::vector<int64_t> place = checked(op, positions, B, N, cells);
    const int64_t batch = positions.has_value() && positions->dim() == 2 ? N : 0;
    if (is_causal) {
      causal.assign(place.begin(), place.end());
      args.causal = causal.data(), args.causal_batch = batch;
    }
    if (!bias.has_value()) return;
    const int64_t h = 2 * window[1] - 1, w = 2 * window[2] - 1;
    args.differences = (2 * window[0] - 1) * h * w, args.middle = args.differences / 2;
    const int64_t entries = args.differences + 2 * num_global + num_global * num_global;
    check_value(bias->dim() == 2 && bias->size(0) == entries && bias->size(1) == H, op,
                ": the bias table must have shape (", entries, ", ", H, "), got ", bias->sizes());
    args.table_head = entries + 2 * PAD;
    constexpr float LOG2E = 1.44269504088896340736f;
    table = turned(*bias, LOG2E), args.table = floats(table) + PAD;
    for (int64_t at : place) {
      int64_t x = at % window[2], y = at / window[2] % window[1], t = at / window[2] / window[1];
      codes.push_back((int32_t)((t * h + y) * w + x));
    }
    args.codes = codes.data(), args.codes_batch = batch;
  }
  HostPositions(const HostPositions&) = delete;  // `args` points to what it owns

  // Adds the tangent of the table, of whose shape it must be.
  void set_tangent(const Tensor& tangent) {
    table_tangent = turned(tangent, 1), args.table_tangent = floats(table_tangent) + PAD;
  }

  // Zeros for the gradients of `tables` tables, and where the first begins.
  Tensor start_grads(int64_t tables) const { return zeros({tables, args.table_head}); }
  static float* first(const Tensor& grads) { return floats(grads) + PAD; }

  // The gradient (R, H) of the table, from those of the table turned around of each of (any, H).
  Tensor finish_grads(const Tensor& grads, int64_t H) const {
    const int64_t tables = grads.size(0), table_head = args.table_head, entries = table_head - 2 * PAD;
    Tensor result = empty({entries, H}, ScalarType::Float);
    const float* from = first(grads);
    float* to = floats(result);
    torch::stable::parallel_for(0, entries, 1024, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(end - begin);
      for (int64_t h = 0; h < H; ++h) {
        std::fill(sums.begin(), sums.end(), 0.f);
        for (int64_t table = h; table < tables; table += H)
          for (int64_t i = begin; i < end; ++i) sums[i - begin] += from[table * table_head + i];
        for (int64_t i = begin; i < end; ++i) to[turned(i) * H + h] = sums[i - begin];
      }
    });
    return result;
  }
};

}  // namespace vattn
