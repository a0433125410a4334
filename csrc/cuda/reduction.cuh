// How the blocks of a reduction add their rows up.
#pragma once

#include "vector.cuh"

namespace fused_resnet::cuda {

// The channel of a tile whose sums a thread ends up with, and where it goes; every thread of the block calls.
struct Owner {
  __device__ Owner(const Plan& plan, int vector) : width(plan.tile_columns * vector) {
    channel = blockIdx.x % plan.column_tiles * width + threadIdx.x;
    part = blockIdx.x / plan.column_tiles;
    writes = threadIdx.x < width && channel < plan.channels;
  }

  int width;  // channels of a tile
  int64_t channel, part;
  bool writes;
};

// The sums over a block's rows of the values that every thread has for its channels; thread c < owner.width gets that
// of channel c of the tile.  In double: the sum may be far smaller than its terms.
template <int kVector>
__device__ double sum_of_rows(const float (&values)[kVector], const Owner& owner, int block_rows, float* shared) {
  __syncthreads();  // what is there has been read
#pragma unroll
  for (int v = 0; v < kVector; ++v) shared[threadIdx.x * kVector + v] = values[v];
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < owner.width) {
#pragma unroll 8
    for (int row = 0; row < block_rows; ++row) sum += shared[row * owner.width + threadIdx.x];
  }
  return sum;
}

}  // namespace fused_resnet::cuda
