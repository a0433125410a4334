// Batch norm, optional second branch and ReLU on a GPU: the passes over the activations, each with the per-channel step
// that finishes it.
//
// Activations are channels_last.  Per-channel tensors are float, [rows, channels], contiguous.  A function queues its
// kernels on the stream and returns the error of the launch.  Where a comment says "bytes", s is the size of an
// element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "plan.h"
#include "types.h"

namespace fused_resnet::cuda {

struct Launch {
  cudaStream_t stream;
  int multiprocessors;
};

// γ or β, of any floating dtype; null where there is none.
struct Parameter {
  const void* values;
  DType dtype;
  int64_t stride;
};

// moments = (mean, biased variance, unbiased variance) and affine (see BatchNormAffine), in two kernels.
// Bytes: s an element; 16 a channel and part for the partial moments.
struct BatchNormStats {
  Plan plan;  // reduction_plan()
  DType dtype;
  const void* x;
  Parameter weight, bias;
  double eps;
  double* partial;  // [2, parts, channels]
  float* moments;   // [3, channels]
  float* affine;    // [2, channels]
};
cudaError_t batch_norm_stats(const Launch& launch, const BatchNormStats& op);

// affine = (a, b):  a = γ/√(var + eps) rounded to float, b = β − mean·a.
struct BatchNormAffine {
  int64_t channels;
  const float* moments;  // [3, channels]
  Parameter weight, bias;
  double eps;
  float* affine;  // [2, channels]
};
cudaError_t batch_norm_affine(const Launch& launch, const BatchNormAffine& op);

// z = act(a·x + b + R), with R = 0, residual, or a_r·residual + b_r.  Bytes: 2s an element, s for each of the residual.
// z may be x.
struct BatchNormAct {
  Matrix matrix;
  const void* x;
  const float* affine;           // [2, channels]
  const void* residual;          // or null
  const float* residual_affine;  // [2, channels], or null
  void* z;
  bool relu;
  ChannelPart residual_part;  // the channels that the residual has; all where there is a residual_affine
};
cudaError_t batch_norm_act(const Launch& launch, const BatchNormAct& op);

// G = grad, or 0 where relu and value <= 0; the value is z, or a·x + b where z is null.
struct MaskedGradient {
  const void* grad;
  const void* z;        // or null
  const float* affine;  // [2, channels]
  bool relu;
};

// sums = ΣG, ΣG·(x − mean), and ΣG, ΣG·(residual − residual_mean) where there is a residual, in two kernels.
// Bytes: 2s an element, s for each of z and residual; 8 or 12 a channel and part for the partial sums.
struct BatchNormActReduce {
  Plan plan;  // reduction_plan()
  DType dtype;
  MaskedGradient gradient;
  const void* x;
  const float* mean;  // [channels]
  const void* residual;
  const float* residual_mean;  // [channels], or null where there is no residual
  float* partial;              // [2 or 3, parts, channels]
  float* sums;                 // [2 or 4, channels]
};
cudaError_t batch_norm_act_reduce(const Launch& launch, const BatchNormActReduce& op);

// masked = G = grad, or grad + other, or 0 where z <= 0, and sums = ΣG of what is stored, in two kernels.
// Bytes: 3s an element, 4s with other; 4 a channel and part for the partial sums.  masked may be grad.
struct MaskedGrad {
  Plan plan;  // reduction_plan()
  DType dtype;
  const void* grad;
  const void* other;  // or null
  const void* z;
  void* masked;
  float* partial;  // [parts, channels]
  float* sums;     // [channels]
};
cudaError_t masked_grad(const Launch& launch, const MaskedGrad& op);

// dγ = rstd·ΣG·(x − mean), dβ = ΣG;  a, g0 = dβ/m, k = rstd·dγ/m, mean, with m = count.
struct BatchNormCoefficients {
  int64_t channels;
  const float* sums;     // [2, channels], of one branch
  const float* moments;  // [3, channels]
  Parameter weight;
  double eps;
  int64_t count;
  bool batch_stats;  // else there is only a
  float* grad_weight;
  float* grad_bias;
  float* coefficients;  // [4, channels] or [1, channels]
};
cudaError_t batch_norm_coefficients(const Launch& launch, const BatchNormCoefficients& op);

// What takes G to the gradient of a batch norm's input.
struct Coefficients {
  const float* rows;  // a, g0, k, mean [4, channels], or a [1, channels]
  bool batch_stats;   // there are four
};

// dx = a·((G − g0) − k·(x − mean)), or a·G; and the same for a residual branch, or G itself, or the activation, as a
// second output.  Bytes: 3s an element, s for each of gradient.z, masked and z, 2s for a residual.  dx may be grad.
struct BatchNormActBackward {
  Matrix matrix;
  MaskedGradient gradient;
  const void* x;
  Coefficients coefficients;
  void* dx;
  void* masked;          // G is written here, or null
  const void* residual;  // or null
  Coefficients residual_coefficients;
  void* residual_dx;
  ChannelPart masked_part;  // the channels of masked
  void* z;                  // act(a·x + b) is written here, or null; instead of gradient.z and masked
};
cudaError_t batch_norm_act_backward(const Launch& launch, const BatchNormActBackward& op);

// dx += G, with G = grad, or 0 where z <= 0.  Bytes: 3s an element, 4s with z.
struct AddMasked {
  Matrix matrix;
  const void* grad;
  const void* z;  // or null
  void* dx;
};
cudaError_t add_masked(const Launch& launch, const AddMasked& op);

}  // namespace fused_resnet::cuda
