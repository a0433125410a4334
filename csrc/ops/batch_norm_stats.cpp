// The statistics of batch norm's input, and the scale and shift that they give.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "allocation.h"

namespace fused_resnet {
namespace {

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                            double eps) {
  const Arguments arguments("batch_norm_stats", "x", x);
  const Parameter weights = arguments.parameter("weight", weight), biases = arguments.parameter("bias", bias);
  Tensor moments = empty_rows(arguments, 3), affine = empty_rows(arguments, 2);
  engine::batch_norm_stats(arguments, {arguments.image(), data(x), weights, biases, eps, moments.mutable_data_ptr(),
                                       affine.mutable_data_ptr()});
  return {moments, affine};
}

Tensor batch_norm_affine(const Tensor& moments, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const ChannelArguments arguments("batch_norm_affine", moments);
  const Parameter weights = arguments.parameter("weight", weight), biases = arguments.parameter("bias", bias);
  Tensor affine = empty_rows(arguments, 2);
  engine::batch_norm_affine(arguments, {dtype_of(arguments.accumulator()), arguments.channels(), data(moments), weights,
                                        biases, eps, affine.mutable_data_ptr()});
  return affine;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, FUSED_RESNET_DISPATCH_KEY, m) {
  m.impl("batch_norm_stats", TORCH_BOX(&fused_resnet::batch_norm_stats));
  m.impl("batch_norm_affine", TORCH_BOX(&fused_resnet::batch_norm_affine));
}
