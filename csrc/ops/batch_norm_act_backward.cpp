// Batch norm's backward: the pass that sums, the step that makes coefficients of the sums, and the pass that makes the
// gradients of them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "allocation.h"

namespace fused_resnet {
namespace {

Tensor batch_norm_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& moments, const Tensor& affine,
                             const OptionalTensor& z, const OptionalTensor& residual,
                             const OptionalTensor& residual_moments, bool relu) {
  const Arguments arguments("batch_norm_act_reduce", "x", x);
  arguments.check_like("grad", grad);
  arguments.check_channels("moments", moments, 3);
  arguments.check_channels("affine", affine, 2);
  if (z.has_value()) arguments.check_like("z", *z);
  if (residual.has_value()) arguments.check_like("residual", *residual);
  arguments.check_partner("residual_moments", residual_moments, 3, "residual", residual);
  Tensor sums = empty_rows(arguments, residual.has_value() ? 4 : 2);
  engine::batch_norm_act_reduce(arguments, grad, x, moments, affine, z, residual, residual_moments, relu, sums);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_coefficients(const Tensor& sums, int64_t branch, const Tensor& moments,
                                                           const OptionalTensor& weight, double eps, int64_t count,
                                                           bool batch_stats) {
  const ChannelArguments arguments("batch_norm_coefficients", moments);
  if (branch != 0 && branch != 1) arguments.fail("branch", "a value of 0 or 1", std::to_string(branch));
  // the sums of one branch, or of two
  arguments.check_channels("sums", sums, branch == 1 || (sums.dim() == 2 && sums.size(0) == 4) ? 4 : 2);
  arguments.check_parameter("weight", weight);
  Tensor grad_weight = empty_channels(arguments), grad_bias = empty_channels(arguments);
  Tensor coefficients = empty_rows(arguments, batch_stats ? 4 : 1);
  engine::batch_norm_coefficients(arguments, sums, branch, moments, weight, eps, count, batch_stats, grad_weight,
                                  grad_bias, coefficients);
  return {grad_weight, grad_bias, coefficients};
}

// Coefficients have four rows, or one where the statistics were not the batch's own.
int64_t coefficient_rows(const OptionalTensor& t) { return t.has_value() && t->dim() == 2 && t->size(0) == 1 ? 1 : 4; }

// What both forms of backward are given for the branch that they share.
void check_backward(const Arguments& arguments, const Tensor& grad, const Tensor& affine, const Tensor& coefficients,
                    const OptionalTensor& z) {
  arguments.check_like("grad", grad);
  arguments.check_channels("affine", affine, 2);
  arguments.check_channels("coefficients", coefficients, coefficient_rows(coefficients));
  if (z.has_value()) arguments.check_like("z", *z);
}

std::tuple<Tensor, Tensor> batch_norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& affine,
                                                   const Tensor& coefficients, const OptionalTensor& z,
                                                   const OptionalTensor& residual,
                                                   const OptionalTensor& residual_coefficients, bool relu,
                                                   int64_t masked_channels, int64_t masked_channel) {
  const Arguments arguments("batch_norm_act_backward", "x", x);
  check_backward(arguments, grad, affine, coefficients, z);
  if (residual.has_value()) arguments.check_like("residual", *residual);
  arguments.check_partner("residual_coefficients", residual_coefficients, coefficient_rows(residual_coefficients),
                          "residual", residual);
  arguments.check_value("masked_channels", masked_channels, arguments.channels());
  arguments.check_value("masked_channel", masked_channel, arguments.channels() - masked_channels);

  const bool branch = residual.has_value(), write_masked = masked_channels != 0 && !branch;
  Tensor dx = empty_beside(x), second = branch         ? empty_beside(grad)
                                        : write_masked ? empty_part(arguments, grad, masked_channels)
                                                       : nothing(grad);
  void* second_data = second.mutable_data_ptr();
  engine::batch_norm_act_backward(arguments, grad, x, affine, coefficients, z, residual, residual_coefficients, relu,
                                  {
                                      dx.mutable_data_ptr(),
                                      branch ? second_data : nullptr,
                                      write_masked ? second_data : nullptr,
                                      {masked_channel, masked_channels},
                                      nullptr,
                                  });
  return {dx, second};
}

// The gradient's memory becomes that of dx: one tensor less to allocate, and every line written is in the cache.  The
// activation costs its own writes alone, since x is being read.
Tensor batch_norm_act_backward_(const Tensor& grad, const Tensor& x, const Tensor& affine, const Tensor& coefficients,
                                const OptionalTensor& z, bool relu, bool wants_activation) {
  const Arguments arguments("batch_norm_act_backward_", "x", x);
  check_backward(arguments, grad, affine, coefficients, z);
  if (wants_activation && z.has_value()) arguments.fail("z", "no value where wants_activation is true", "a tensor");
  Tensor activation = wants_activation ? empty_beside(x) : nothing(x);
  void* activation_data = wants_activation ? activation.mutable_data_ptr() : nullptr;
  engine::batch_norm_act_backward(arguments, grad, x, affine, coefficients, z, std::nullopt, std::nullopt, relu,
                                  {grad.mutable_data_ptr(), nullptr, nullptr, {}, activation_data});
  return activation;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, FUSED_RESNET_DISPATCH_KEY, m) {
  m.impl("batch_norm_act_reduce", TORCH_BOX(&fused_resnet::batch_norm_act_reduce));
  m.impl("batch_norm_coefficients", TORCH_BOX(&fused_resnet::batch_norm_coefficients));
  m.impl("batch_norm_act_backward", TORCH_BOX(&fused_resnet::batch_norm_act_backward));
  m.impl("batch_norm_act_backward_", TORCH_BOX(&fused_resnet::batch_norm_act_backward_));
}
