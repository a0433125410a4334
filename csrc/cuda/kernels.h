// The CUDA kernels, launched: every operation of an engine (ops/engine.h) on a GPU.
//
// Activations are channels_last, per-channel tensors are float.  A function queues its kernels on the stream and
// returns the error of the launch.
#pragma once

#include <cuda_runtime.h>

#include "ops/engine.h"
#include "plan.h"

namespace fused_resnet::cuda {

struct Launch {
  cudaStream_t stream;
  int multiprocessors;
};

cudaError_t batch_norm_affine(const Launch& launch, const BatchNormAffine& op);
cudaError_t batch_norm_act(const Launch& launch, const BatchNormAct& op);
cudaError_t batch_norm_coefficients(const Launch& launch, const BatchNormCoefficients& op);
cudaError_t batch_norm_act_backward(const Launch& launch, const BatchNormActBackward& op);
cudaError_t add_masked(const Launch& launch, const AddMasked& op);

// A reduction: a kernel over parts of the rows, then one that merges the parts.
template <typename Op, typename P>
struct Reduction {
  Plan plan;  // reduction_plan()
  Op op;
  P* partial;  // [values, parts, channels], written and read once
};
cudaError_t batch_norm_stats(const Launch& launch, const Reduction<BatchNormStats, double>& reduction);
cudaError_t batch_norm_act_reduce(const Launch& launch, const Reduction<BatchNormActReduce, float>& reduction);
cudaError_t masked_grad(const Launch& launch, const Reduction<MaskedGrad, float>& reduction);

}  // namespace fused_resnet::cuda
