// What an engine does for the operations: csrc/ops checks their arguments and allocates what they return, csrc/<engine>
// implements this header.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "types.h"

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

class ChannelArguments;
class Arguments;

// What the kernels of this library take.
struct Engine {
  int32_t device_type;  // as aoti_torch_device_type_cpu() numbers them
  std::vector<ScalarType> dtypes;
  bool contiguous;  // the memory format, beside channels_last
};
extern const Engine kEngine;

namespace engine {

// The formulas stand beside the kernels.  Every tensor has been checked, outputs are the last arguments, and an output
// that takes the place of an input may be the same tensor.

void batch_norm_stats(const Arguments& arguments, const Tensor& x, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps, const Tensor& moments, const Tensor& affine);

void batch_norm_affine(const ChannelArguments& arguments, const Tensor& moments, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, const Tensor& affine);

void batch_norm_coefficients(const ChannelArguments& arguments, const Tensor& sums, int64_t branch,
                             const Tensor& moments, const OptionalTensor& weight, double eps, int64_t count,
                             bool batch_stats, const Tensor& grad_weight, const Tensor& grad_bias,
                             const Tensor& coefficients);

void batch_norm_act(const Arguments& arguments, const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
                    const OptionalTensor& residual_affine, bool relu, int64_t residual_channel, const Tensor& z);

void batch_norm_act_reduce(const Arguments& arguments, const Tensor& grad, const Tensor& x, const Tensor& moments,
                           const Tensor& affine, const OptionalTensor& z, const OptionalTensor& residual,
                           const OptionalTensor& residual_moments, bool relu, const Tensor& sums);

// What backward writes; null where nobody asked for it.
struct BackwardOutputs {
  void* dx;           // may be grad
  void* residual_dx;  // there is a residual
  void* masked;       // G, in the channels of masked_part
  ChannelPart masked_part;
  void* activation;  // act(a·x + b)
};
void batch_norm_act_backward(const Arguments& arguments, const Tensor& grad, const Tensor& x, const Tensor& affine,
                             const Tensor& coefficients, const OptionalTensor& z, const OptionalTensor& residual,
                             const OptionalTensor& residual_coefficients, bool relu, const BackwardOutputs& outputs);

void masked_grad(const Arguments& arguments, const Tensor& grad, const OptionalTensor& other, const Tensor& z,
                 const Tensor& masked, const Tensor& sum_grad);

void add_masked(const Arguments& arguments, const Tensor& grad, const OptionalTensor& z, const Tensor& dx);

}  // namespace engine

// ---- what both sides ask of a tensor

inline Sizes sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline int64_t itemsize(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// The kernels' name of a floating dtype.
inline DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

}  // namespace fused_resnet
