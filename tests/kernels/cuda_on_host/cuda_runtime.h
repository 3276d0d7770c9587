// Enough of CUDA to run a kernel on the host, in one thread: those of a block take turns from one __syncthreads() to the
// next, in ascending or in descending order, so that a kernel that lacks one of them computes something else.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

using std::max;
using std::min;
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct Index { unsigned x; };

inline Index threadIdx, blockIdx;

namespace on_host {

constexpr size_t STACK = 1 << 16;
struct Fiber {
  ucontext_t context;
  bool done;
  std::unique_ptr<char[]> stack{new char[STACK]};
};

inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void()> body;

inline void run_body() {
  body();
  running->done = true;
}

inline void run_block(std::vector<Fiber>& fibers, bool descending) {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler, fiber.done = false;
    makecontext(&fiber.context, run_body, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (size_t i = 0; i < fibers.size(); ++i) {
      threadIdx.x = (unsigned)(descending ? fibers.size() - 1 - i : i);
      running = &fibers[threadIdx.x];
      if (!running->done) swapcontext(&scheduler, &running->context);
      left |= !running->done;
    }
  }
}

// kernel<<<blocks, threads>>>(arguments...)
template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, bool descending, Arguments... arguments) {
  std::vector<Fiber> fibers(threads);
  body = [=] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(fibers, descending);
}

}  // namespace on_host

inline void __syncthreads() {
  unsigned thread = threadIdx.x;
  swapcontext(&on_host::running->context, &on_host::scheduler);
  threadIdx.x = thread;
}
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
