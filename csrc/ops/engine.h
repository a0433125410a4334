// What the operations ask of an engine, in pointers and sizes.  csrc/ops has checked every tensor and allocated what is
// written; csrc/cpu and csrc/cuda implement the functions, each for its own library.
//
// Per-channel tensors are [rows, C] of the accumulation dtype (float, or double for float64).  Where a comment says
// "bytes", s is the size of an element.
#pragma once

#include <cstdint>

namespace fused_resnet {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

inline int64_t itemsize(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// A dense activation [N, C, H, W], channels_last or contiguous.
struct Image {
  DType dtype;
  bool channels_last;
  int64_t pixels;  // N * H * W
  int64_t channels;
  int64_t plane;  // H * W
};

// The activations, as fused_resnet/ops/activation.py numbers them; their formulas are there.
enum class ActKind { kNone, kRelu, kLeakyRelu, kHardtanh, kSilu, kHardswish, kGelu, kGeluTanh };

struct Act {
  ActKind kind;
  double alpha, beta;  // LeakyReLU's slope; Hardtanh's bounds
};

// Some of an activation's channels: `count` of them, from `first` on.
struct ChannelPart {
  int64_t first;
  int64_t count;
};

// γ or β, of any floating dtype; null where there is none.
struct Parameter {
  const void* values;
  DType dtype;
  int64_t stride;
};

// moments = (mean, biased variance, unbiased variance) and affine, as below.  Bytes: s an element.
struct BatchNormStats {
  Image image;
  const void* x;
  Parameter weight, bias;
  double eps;
  void* moments;  // [3, C]
  void* affine;   // [2, C]
};

// affine = (a, b):  a = γ/√(var + eps), rounded, and b = β − mean·a.
struct BatchNormAffine {
  DType dtype;
  int64_t channels;
  const void* moments;
  Parameter weight, bias;
  double eps;
  void* affine;
};

// z = act(a·x + b + R), with R = 0, residual, or a_r·residual + b_r.  Bytes: 2s an element, s for each of the residual.
// z may be x.
struct BatchNormAct {
  Image image;
  const void* x;
  const void* affine;
  const void* residual;         // or null
  const void* residual_affine;  // or null
  void* z;
  Act act;
  ChannelPart residual_part;  // the channels that the residual has; all where there is a residual_affine
};

// G = grad·act'(v), with v = z, or a·x + b where z is null.  z is what the activation was made of; for a ReLU what it
// has made serves as well, since its sign is the same.
struct MaskedGradient {
  const void* grad;
  const void* z;
  const void* affine;
  Act act;
};

// sums = ΣG, ΣG·(x − mean), and ΣG, ΣG·(residual − residual_mean) where there is a residual.  Bytes: 2s an element, s
// for each of z and residual.
struct BatchNormActReduce {
  Image image;
  MaskedGradient gradient;
  const void* x;
  const void* mean;
  const void* residual;
  const void* residual_mean;  // null where there is no residual
  void* sums;                 // [2, C] or [4, C]
};

// dγ = rstd·ΣG·(x − mean), dβ = ΣG;  a, g0 = dβ/m, k = rstd·dγ/m, mean, with m = count.
struct BatchNormCoefficients {
  DType dtype;
  int64_t channels;
  const void* sums;  // [2, C], of one branch
  const void* moments;
  Parameter weight;
  double eps;
  int64_t count;
  bool batch_stats;  // else there is only a
  void* grad_weight;
  void* grad_bias;
  void* coefficients;  // [4, C] or [1, C]
};

// What takes G to the gradient of a batch norm's input.
struct Coefficients {
  const void* rows;  // a, g0, k, mean [4, C], or a [1, C]
  bool batch_stats;  // there are four
};

// dx = a·((G − g0) − k·(x − mean)), or a·G; and the same for a residual branch, or G itself, or the activation, as a
// second output.  Bytes: 3s an element, s for each of gradient.z, masked and z, 2s for a residual.  dx may be grad.
struct BatchNormActBackward {
  Image image;
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

// masked = G = grad, or grad + other, or 0 where z <= 0, and sums = ΣG of what is stored.  Bytes: 3s an element, 4s
// with other.  masked may be grad.
struct MaskedGrad {
  Image image;
  const void* grad;
  const void* other;  // or null
  const void* z;
  void* masked;
  void* sums;  // [C]
};

// dx += G, with G = grad, or 0 where z <= 0.  Bytes: 3s an element, 4s with z.
struct AddMasked {
  Image image;
  const void* grad;
  const void* z;  // or null
  void* dx;
};

class ChannelArguments;

// `arguments` say on which device, and what an error names.
namespace engine {
void batch_norm_stats(const ChannelArguments& arguments, const BatchNormStats& op);
void batch_norm_affine(const ChannelArguments& arguments, const BatchNormAffine& op);
void batch_norm_act(const ChannelArguments& arguments, const BatchNormAct& op);
void batch_norm_act_reduce(const ChannelArguments& arguments, const BatchNormActReduce& op);
void batch_norm_coefficients(const ChannelArguments& arguments, const BatchNormCoefficients& op);
void batch_norm_act_backward(const ChannelArguments& arguments, const BatchNormActBackward& op);
void masked_grad(const ChannelArguments& arguments, const MaskedGrad& op);
void add_masked(const ChannelArguments& arguments, const AddMasked& op);
}  // namespace engine

}  // namespace fused_resnet
