#include "device.h"

namespace fused_resnet {

namespace {

cuda::MaskedGradient masked_gradient(const Tensor& grad, const OptionalTensor& z, const Tensor& affine, bool relu) {
  return {data(grad), relu ? data(z) : nullptr, floats(affine), relu};
}

cuda::Coefficients coefficients_of(const OptionalTensor& t) { return {floats(t), t.has_value() && t->size(0) == 4}; }

}  // namespace

void engine::batch_norm_act_reduce(const Arguments& arguments, const Tensor& grad, const Tensor& x,
                                   const Tensor& moments, const Tensor& affine, const OptionalTensor& z,
                                   const OptionalTensor& residual, const OptionalTensor& residual_moments, bool relu,
                                   const Tensor& sums) {
  const Device device(arguments);
  const cuda::Matrix matrix = matrix_of(arguments);
  const cuda::Plan plan = device.reduction_plan(
      matrix, {data(grad), data(x), data(moments), data(affine), data(z), data(residual), data(residual_moments)});
  const int64_t rows = residual.has_value() ? 3 : 2;  // ΣG is the same for both branches
  const Tensor partial = empty_partial(arguments, plan, rows, ScalarType::Float);
  const cuda::BatchNormActReduce op = {
      plan,
      matrix.dtype,
      masked_gradient(grad, z, affine, relu),
      data(x),
      floats(moments),
      data(residual),
      floats(residual_moments),
      mutable_floats(partial),
      mutable_floats(sums),
  };
  device.check(cuda::batch_norm_act_reduce(device.launch(), op));
}

void engine::batch_norm_coefficients(const ChannelArguments& arguments, const Tensor& sums, int64_t branch,
                                     const Tensor& moments, const OptionalTensor& weight, double eps, int64_t count,
                                     bool batch_stats, const Tensor& grad_weight, const Tensor& grad_bias,
                                     const Tensor& coefficients) {
  const Device device(arguments);
  const int64_t channels = arguments.channels();
  const cuda::BatchNormCoefficients op = {
      channels,
      floats(sums) + 2 * branch * channels,
      floats(moments),
      parameter(weight),
      eps,
      count,
      batch_stats,
      mutable_floats(grad_weight),
      mutable_floats(grad_bias),
      mutable_floats(coefficients),
  };
  device.check(cuda::batch_norm_coefficients(device.launch(), op));
}

void engine::batch_norm_act_backward(const Arguments& arguments, const Tensor& grad, const Tensor& x,
                                     const Tensor& affine, const Tensor& coefficients, const OptionalTensor& z,
                                     const OptionalTensor& residual, const OptionalTensor& residual_coefficients,
                                     bool relu, const BackwardOutputs& outputs) {
  const Device device(arguments);
  const cuda::BatchNormActBackward op = {
      matrix_of(arguments),
      masked_gradient(grad, z, affine, relu),
      data(x),
      coefficients_of(coefficients),
      outputs.dx,
      outputs.masked,
      data(residual),
      coefficients_of(residual_coefficients),
      outputs.residual_dx,
      outputs.masked_part,
      outputs.activation,
  };
  device.check(cuda::batch_norm_act_backward(device.launch(), op));
}

}  // namespace fused_resnet
