// Between PyTorch's tensors and the kernels: what every operator's CPU side needs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <utility>

#include "kernels.h"

namespace vattn {

inline Dtype dtype_of(const char* op, const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::Float32;
    case at::kBFloat16: return Dtype::BFloat16;
    case at::kHalf: return Dtype::Float16;
    default:
      TORCH_CHECK_TYPE(false, op, ": the kernels take float32, bfloat16 and float16, got dtype=", x.scalar_type());
  }
}

// The kernels read rows whose last axis is contiguous; any other tensor is copied.
inline at::Tensor with_rows(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

inline Video video(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// An empty (B, H, T, N, D) that lies in memory as (B, T, N, H, D), so that merging heads is a view.
inline at::Tensor empty_rows(const at::Tensor& like) {
  auto s = like.sizes();
  return at::empty({s[0], s[2], s[3], s[1], s[4]}, like.options()).permute({0, 3, 1, 2, 4});
}

// Runs items [0, items) on PyTorch's threads, each of which gets `floats` of workspace.
template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t items, int64_t floats) {
  if (items == 0) return;
  floats += 64;  // threads do not share cache lines
  at::Tensor workspace = at::empty({at::get_num_threads(), floats}, at::kFloat);
  float* base = workspace.data_ptr<float>();
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, base + at::get_thread_num() * floats);
  });
}

template <class Kernel, class Args>
void run(Kernel kernel, const Args& args, int64_t rows) {
  constexpr int64_t ROWS_WORTH_A_THREAD = 256;
  at::parallel_for(0, rows, ROWS_WORTH_A_THREAD, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace vattn
