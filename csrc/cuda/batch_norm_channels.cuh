// The steps between the passes, which finish the partial results of a reduction: a few values a channel, in double.
#pragma once

#include "kernels.h"

namespace fused_resnet::cuda {

// moments and affine from the partial moments of op.
cudaError_t finish_stats(const Launch& launch, const BatchNormStats& op);

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
