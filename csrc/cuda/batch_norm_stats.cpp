#include "device.h"

namespace fused_resnet {

void engine::batch_norm_stats(const Arguments& arguments, const Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, double eps, const Tensor& moments, const Tensor& affine) {
  const Device device(arguments);
  const cuda::Matrix matrix = matrix_of(arguments);
  const cuda::Plan plan = device.reduction_plan(matrix, {data(x)});
  const Tensor partial = empty_partial(arguments, plan, 2, ScalarType::Double);
  const cuda::BatchNormStats op = {
      plan,
      matrix.dtype,
      data(x),
      parameter(weight),
      parameter(bias),
      eps,
      static_cast<double*>(partial.mutable_data_ptr()),
      mutable_floats(moments),
      mutable_floats(affine),
  };
  device.check(cuda::batch_norm_stats(device.launch(), op));
}

void engine::batch_norm_affine(const ChannelArguments& arguments, const Tensor& moments, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps, const Tensor& affine) {
  const Device device(arguments);
  const cuda::BatchNormAffine op = {
      arguments.channels(), floats(moments), parameter(weight), parameter(bias), eps, mutable_floats(affine),
  };
  device.check(cuda::batch_norm_affine(device.launch(), op));
}

}  // namespace fused_resnet
