// What reductions end in: the sums of a block, and the kernels that merge the parts, a few values a channel in double.
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

// moments and affine from the partial moments.
cudaError_t finish_stats(const Launch& launch, const Reduction<BatchNormStats, double>& reduction);

// What a reduction of gradients leaves.
struct PartialSums {
  Plan plan;
  int rows;              // 1: ΣG;  2, 3: and ΣG·(x − mean) of one branch, of two
  const float* partial;  // [rows, parts, channels]
  float* sums;           // [1, 2 or 4, channels]
};

// sums from the partial ones.
cudaError_t finish_sums(const Launch& launch, const PartialSums& op);

}  // namespace fused_resnet::cuda
