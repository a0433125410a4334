// Batch norm applied, residual add and activation.
#include <torch/csrc/stable/library.h>

#include "allocation.h"

namespace fused_resnet {
namespace {

// Into z, which is x itself or a tensor beside it.
void apply(const Arguments& arguments, const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
           const OptionalTensor& residual_affine, const Act& act, int64_t residual_channel, const Tensor& z) {
  arguments.check_channels("affine", affine, 2);
  if (residual.has_value() && !residual_affine.has_value()) {
    arguments.check_part("residual", *residual, "residual_channel", residual_channel);
  } else {
    if (residual.has_value()) arguments.check_like("residual", *residual);
    arguments.check_value("residual_channel", residual_channel, 0);
  }
  if (residual_affine.has_value()) arguments.check_partner("residual_affine", residual_affine, 2, "residual", residual);
  const ChannelPart residual_part = {residual_channel, residual.has_value() ? residual->size(1) : 0};
  engine::batch_norm_act(arguments, {arguments.image(), data(x), data(affine), data(residual), data(residual_affine),
                                     z.mutable_data_ptr(), act, residual_part});
}

Tensor batch_norm_act(const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
                      const OptionalTensor& residual_affine, int64_t act, double alpha, double beta,
                      int64_t residual_channel) {
  const Arguments arguments("batch_norm_act", "x", x);
  Tensor z = empty_beside(x);
  apply(arguments, x, affine, residual, residual_affine, arguments.act(act, alpha, beta), residual_channel, z);
  return z;
}

void batch_norm_act_(const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
                     const OptionalTensor& residual_affine, int64_t act, double alpha, double beta) {
  const Arguments arguments("batch_norm_act_", "x", x);
  apply(arguments, x, affine, residual, residual_affine, arguments.act(act, alpha, beta), 0, x);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, FUSED_RESNET_DISPATCH_KEY, m) {
  m.impl("batch_norm_act", TORCH_BOX(&fused_resnet::batch_norm_act));
  m.impl("batch_norm_act_", TORCH_BOX(&fused_resnet::batch_norm_act_));
}
