// Prepares a table of biases, a window and positions for the kernels.
#pragma once

#include <numeric>

#include "host.h"

namespace vattn {

// How many tokens are not global.
inline int64_t other_tokens(const char* op, int64_t tokens, int64_t num_global) {
  check_range(op, "num_global", num_global, 0, tokens);
  return tokens - num_global;
}

class HostPositions {
  static constexpr int64_t PAD = 32;  // floats before and after a table, which vectors at its ends read or write
  std::vector<int32_t> causal, codes;
  Tensor table, table_tangent;

  // The position of each of N tokens; default 0 .. N-1.
  static std::vector<int64_t> places(const MaybeTensor& positions, int64_t N) {
    if (positions.has_value()) {
      const int64_t* first = positions->const_data_ptr<int64_t>();
      return {first, first + positions->numel()};
    }
    std::vector<int64_t> place(N);
    std::iota(place.begin(), place.end(), 0);
    return place;
  }

  // Who comes first is all that causality asks of positions: of those that do not fit 32 bits, their ranks.
  static std::vector<int32_t> order(const std::vector<int64_t>& place) {
    auto fits = [](int64_t at) { return 0 <= at && at < INT32_MAX; };
    if (std::all_of(place.begin(), place.end(), fits)) return {place.begin(), place.end()};
    std::vector<int64_t> sorted = place;
    std::sort(sorted.begin(), sorted.end());
    std::vector<int32_t> ranks;
    for (int64_t at : place)
      ranks.push_back((int32_t)(std::lower_bound(sorted.begin(), sorted.end(), at) - sorted.begin()));
    return ranks;
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
    MaybeTensor given;
    if (positions.has_value()) given = checked_positions(op, *positions, B, N);
    check_value(window.size() == (bias.has_value() ? 3 : 0), op,
                ": window must have three sizes with a bias_table, and none without, got window=", Sizes(window));
    if (!bias.has_value() && !is_causal) return;
    const std::vector<int64_t> place = places(given, N);
    const int64_t batch = positions.has_value() && positions->dim() == 2 ? N : 0;
    if (is_causal) {
      causal = order(place);
      args.causal = causal.data(), args.causal_batch = batch;
    }
    if (!bias.has_value()) return;
    for (int64_t size : window) check_range(op, "a size of window", size, 1, INT32_MAX);
    const int64_t h = 2 * window[1] - 1, w = 2 * window[2] - 1, cells = checked_product(op, "window", window);
    args.differences = checked_product(op, "window", {2 * window[0] - 1, h, w}), args.middle = args.differences / 2;
    check_range(op, "the offsets of window", args.differences, 1, INT32_MAX);
    for (int64_t at : place)
      check_value(0 <= at && at < cells, op, ": positions must be from 0 to below ", cells, ", got a position of ", at);
    check_range(op, "num_global", num_global, 0, 1 << 15);
    const int64_t entries = args.differences + 2 * num_global + num_global * num_global;
    check_range(op, "the rows of bias_table", entries, 1, INT32_MAX);
    check_tensor(op, "bias_table", *bias, {entries, H}, ScalarType::Float);
    checked_product(op, "bias_table.shape", bias->sizes());
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
