// As much of CUDA as the kernels use, on the CPU: the kernels' own source, compiled by a C++ compiler, gives numbers
// where there is no GPU.
//
// A block's threads are fibers of one thread.  A phase between two barriers runs them one after the other, in every
// second block from the last to the first, so that a barrier that is missing gives wrong numbers, every time; a barrier
// that not all threads reach ends the process.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::isfinite;

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  dim3(unsigned x_ = 1) : x(x_) {}
  unsigned x;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline float __fdividef(float x, float y) { return x / y; }

inline dim3 threadIdx, blockIdx;

namespace cuda_emulation {

constexpr size_t kStackBytes = 64 << 10;

// Switching by setjmp and longjmp, since swapcontext asks the kernel for the signal mask.
struct Fiber {
  ucontext_t entry;
  jmp_buf resume;
  bool started;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline void run_fiber() {
  body();
  fibers[threadIdx.x].done = true;
  _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

inline void wait(Fiber& fiber) {
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

inline void run_block(unsigned threads) {
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.entry, run_fiber, 0);
  }
  for (unsigned done = 0; done != threads;) {
    done = 0;
    for (unsigned i = 0; i < threads; ++i) {
      threadIdx.x = blockIdx.x % 2 == 0 ? i : threads - 1 - i;
      resume(fibers[threadIdx.x]);
      done += fibers[threadIdx.x].done;
    }
    if (done != 0 && done != threads) {
      std::fprintf(stderr, "%u of %u threads did not reach a barrier\n", done, threads);
      std::abort();
    }
  }
}

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::wait(cuda_emulation::fibers[threadIdx.x]); }

template <typename Bits>
void __stwb(Bits* address, Bits value) {
  *address = value;
}

// ---- the runtime

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  cuda_emulation::body = [&] { kernel(Parameters(arguments)...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) cuda_emulation::run_block(config->blockDim.x);
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // few enough that a thread has many rows, odd so that tiles do not share them out evenly
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
