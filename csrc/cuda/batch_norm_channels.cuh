// The steps between the passes, which finish the partial results of a reduction: a few values a channel, in double.
#pragma once

#include "fused_resnet/cuda/batch_norm_act.h"

namespace fused_resnet::cuda {

// moments and affine from the partial moments of op.
cudaError_t finish_stats(const Launch& launch, const BatchNormStats& op);

// sums from the partial sums of op.
cudaError_t finish_reduce(const Launch& launch, const BatchNormActReduce& op);

}  // namespace fused_resnet::cuda
