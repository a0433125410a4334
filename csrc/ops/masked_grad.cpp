// The gradient behind a ReLU: masked and summed, or added masked onto another.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "allocation.h"

namespace fused_resnet {
namespace {

// G into `masked`, which is grad itself or a tensor beside it; returns its sums.
Tensor mask(const Arguments& arguments, const Tensor& grad, const OptionalTensor& other, const Tensor& z,
            const Tensor& masked) {
  if (other.has_value()) arguments.check_like("other", *other);
  arguments.check_like("z", z);
  Tensor sum_grad = empty_channels(arguments);
  engine::masked_grad(arguments, {arguments.image(), data(grad), data(other), data(z), masked.mutable_data_ptr(),
                                  sum_grad.mutable_data_ptr()});
  return sum_grad;
}

std::tuple<Tensor, Tensor> masked_grad(const Tensor& grad, const Tensor& z) {
  const Arguments arguments("masked_grad", "grad", grad);
  Tensor masked = empty_beside(grad);
  return {masked, mask(arguments, grad, std::nullopt, z, masked)};
}

Tensor masked_grad_(const Tensor& grad, const OptionalTensor& other, const Tensor& z) {
  return mask({"masked_grad_", "grad", grad}, grad, other, z, grad);
}

void add_masked_(const Tensor& dx, const Tensor& grad, const OptionalTensor& z) {
  const Arguments arguments("add_masked_", "dx", dx);
  arguments.check_like("grad", grad);
  if (z.has_value()) arguments.check_like("z", *z);
  engine::add_masked(arguments, {arguments.image(), data(grad), data(z), dx.mutable_data_ptr()});
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, FUSED_RESNET_DISPATCH_KEY, m) {
  m.impl("masked_grad", TORCH_BOX(&fused_resnet::masked_grad));
  m.impl("masked_grad_", TORCH_BOX(&fused_resnet::masked_grad_));
  m.impl("add_masked_", TORCH_BOX(&fused_resnet::add_masked_));
}
