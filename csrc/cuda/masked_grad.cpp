#include "device.h"

namespace fused_resnet {

void engine::masked_grad(const Arguments& arguments, const Tensor& grad, const OptionalTensor& other, const Tensor& z,
                         const Tensor& masked, const Tensor& sum_grad) {
  const Device device(arguments);
  const cuda::Matrix matrix = matrix_of(arguments);
  const cuda::Plan plan = device.reduction_plan(matrix, {data(grad), data(other), data(z), data(masked)});
  const Tensor partial = empty_partial(arguments, plan, 1, ScalarType::Float);
  const cuda::MaskedGrad op = {
      plan,
      matrix.dtype,
      data(grad),
      data(other),
      data(z),
      masked.mutable_data_ptr(),
      mutable_floats(partial),
      mutable_floats(sum_grad),
  };
  device.check(cuda::masked_grad(device.launch(), op));
}

void engine::add_masked(const Arguments& arguments, const Tensor& grad, const OptionalTensor& z, const Tensor& dx) {
  const Device device(arguments);
  const cuda::AddMasked op = {matrix_of(arguments), data(grad), data(z), dx.mutable_data_ptr()};
  device.check(cuda::add_masked(device.launch(), op));
}

}  // namespace fused_resnet
