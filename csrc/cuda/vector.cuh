// How a thread reads and writes elements: several at once, widened to float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace fused_resnet::cuda {

// Two elements at a time, since the conversions of halves come in pairs.
template <typename T>
struct Element;

template <>
struct Element<float> {
  using Pair = float2;
  __device__ static float widen(float value) { return value; }
  __device__ static float2 widen_pair(float2 values) { return values; }
  __device__ static float narrow(float value) { return value; }
  __device__ static float2 narrow_pair(float first, float second) { return make_float2(first, second); }
};

template <>
struct Element<__half> {
  using Pair = __half2;
  __device__ static float widen(__half value) { return __half2float(value); }
  __device__ static float2 widen_pair(__half2 values) { return __half22float2(values); }
  __device__ static __half narrow(float value) { return __float2half_rn(value); }
  __device__ static __half2 narrow_pair(float first, float second) { return __floats2half2_rn(first, second); }
};

template <>
struct Element<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  __device__ static float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  __device__ static float2 widen_pair(__nv_bfloat162 values) { return __bfloat1622float2(values); }
  __device__ static __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
  __device__ static __nv_bfloat162 narrow_pair(float first, float second) {
    return __floats2bfloat162_rn(first, second);
  }
};

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<16> {
  using type = uint4;
};

// kVector elements as one access moves them.
template <typename T, int kVector>
struct Packed {
  using Bits = typename BitsOf<kVector * sizeof(T)>::type;

  __device__ static Packed load(const T* address) { return {*reinterpret_cast<const Bits*>(address)}; }
  // An assignment would leave it to the compiler whether this is one store.
  __device__ void store(T* address) const { __stwb(reinterpret_cast<Bits*>(address), bits); }

  __device__ void unpack(float (&values)[kVector]) const {
    if constexpr (kVector == 1) {
      T value;
      memcpy(&value, &bits, sizeof(bits));
      values[0] = Element<T>::widen(value);
    } else {
      typename Element<T>::Pair pairs[kVector / 2];
      memcpy(pairs, &bits, sizeof(bits));
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) {
        const float2 pair = Element<T>::widen_pair(pairs[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
      }
    }
  }

  __device__ static Packed pack(const float (&values)[kVector]) {
    Packed packed;
    if constexpr (kVector == 1) {
      const T value = Element<T>::narrow(values[0]);
      memcpy(&packed.bits, &value, sizeof(packed.bits));
    } else {
      typename Element<T>::Pair pairs[kVector / 2];
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) {
        pairs[i] = Element<T>::narrow_pair(values[2 * i], values[2 * i + 1]);
      }
      memcpy(&packed.bits, pairs, sizeof(packed.bits));
    }
    return packed;
  }

  __device__ Packed plus(const Packed& other) const {
    float sum[kVector], values[kVector];
    unpack(sum);
    other.unpack(values);
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[v] += values[v];
    return pack(sum);
  }

  Bits bits;
};

// A per-channel tensor, as it is on a GPU.
__device__ inline const float* floats(const void* channels) { return static_cast<const float*>(channels); }
__device__ inline float* floats(void* channels) { return static_cast<float*>(channels); }

// A thread's part of a per-channel row.
template <int kVector>
__device__ void load_channels(const float* address, float (&values)[kVector]) {
  constexpr int kStep = kVector % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < kVector; i += kStep) {
    float part[kStep];
    Packed<float, kStep>::load(address + i).unpack(part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) values[i + j] = part[j];
  }
}

// Which way the rows are taken.  Reductions go from the last to the first: what was written last is what the
// second-level cache still holds.  The pass that applies their result goes the other way, for the same reason.
enum class Walk { kDown, kUp };

// Whose channels and rows a thread has: `count` rows, `step` elements apart.
template <int kVector>
struct Position {
  __device__ Position(const Plan& plan, Walk walk) {
    const bool reverse = walk == Walk::kUp;
    const int64_t part = blockIdx.x / plan.column_tiles, tile = blockIdx.x % plan.column_tiles;
    const int column = threadIdx.x % plan.tile_columns, block_row = threadIdx.x / plan.tile_columns;
    channel = (tile * plan.tile_columns + column) * kVector;
    const int64_t row = part * plan.block_rows + block_row, rows_apart = plan.parts * plan.block_rows;
    if (block_row < plan.block_rows && channel < plan.channels && row < plan.rows) {
      count = static_cast<int>((plan.rows - row + rows_apart - 1) / rows_apart);
    } else {
      channel = 0;  // one that the thread may read
      count = 0;
    }
    begin = (reverse ? plan.rows - 1 - row : row) * plan.channels + channel;
    step = (reverse ? -rows_apart : rows_apart) * plan.channels;
  }

  int64_t channel;      // the first of the thread's kVector channels
  int64_t begin, step;  // offsets of elements
  int count;
};

// kRows rows of a thread, to be read before anything is done with one of them: that many loads are under way at a time.
template <int kRows>
struct Batch {
  int64_t offset[kRows];
  bool inside[kRows];  // else the offset is that of the first row, so that loads need no branch

  template <typename T, int kVector>
  __device__ void load(const T* address, Packed<T, kVector> (&values)[kRows]) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) values[i] = Packed<T, kVector>::load(address + offset[i]);
  }
};

// visit(batch) over the thread's rows, kRows at a time.
template <int kRows, int kVector, typename Visitor>
__device__ void for_batches(const Position<kVector>& position, const Visitor& visit) {
  int64_t offset = position.begin;
  for (int left = position.count; left > 0; left -= kRows, offset += kRows * position.step) {
    Batch<kRows> batch;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      batch.inside[i] = i < left;
      batch.offset[i] = batch.inside[i] ? offset + i * position.step : offset;
    }
    visit(batch);
  }
}

// ---- launches: choices made at run time become the kernels' template arguments

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// visitor(T{}, Constant<vector>{}) with the type of the elements and how many a thread takes at once.
template <typename Visitor>
cudaError_t visit_elements(DType dtype, int vector, const Visitor& visitor) {
  const auto visit = [&](auto element) {
    constexpr int kWidest = 16 / sizeof(element);
    return vector == 1 ? visitor(element, Constant<1>{}) : visitor(element, Constant<kWidest>{});
  };
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kFloat16:
      return visit(__half{});
    case DType::kBFloat16:
      return visit(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Visitor>
cudaError_t visit_bool(bool value, const Visitor& visitor) {
  return value ? visitor(Constant<true>{}) : visitor(Constant<false>{});
}

inline Plan plan_for(const Launch& launch, const Image& image, Occupancy occupancy,
                     std::initializer_list<const void*> pointers, ChannelPart part = {0, 0}) {
  const Matrix matrix = matrix_of(image);
  return plan(matrix, vector_width(matrix, pointers, part), occupancy, launch.multiprocessors);
}

// Queues a kernel; a grid of nothing is no launch.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                          const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace fused_resnet::cuda
