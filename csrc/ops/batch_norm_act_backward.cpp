// Batch norm's backward: the pass that sums, the step that makes coefficients of the sums, and the pass that makes the
// gradients of them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "allocation.h"

namespace fused_resnet {
namespace {

MaskedGradient masked_gradient(const Tensor& grad, const OptionalTensor& z, const Tensor& affine, const Act& act) {
  return {data(grad), act.kind == ActKind::kNone ? nullptr : data(z), data(affine), act};
}

Tensor batch_norm_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& moments, const Tensor& affine,
                             const OptionalTensor& z, const OptionalTensor& residual,
                             const OptionalTensor& residual_moments, int64_t act, double alpha, double beta) {
  const Arguments arguments("batch_norm_act_reduce", "x", x);
  arguments.check_like("grad", grad);
  arguments.check_channels("moments", moments, 3);
  arguments.check_channels("affine", affine, 2);
  if (z.has_value()) arguments.check_like("z", *z);
  if (residual.has_value()) arguments.check_like("residual", *residual);
  arguments.check_partner("residual_moments", residual_moments, 3, "residual", residual);
  Tensor sums = empty_rows(arguments, residual.has_value() ? 4 : 2);
  engine::batch_norm_act_reduce(
      arguments, {arguments.image(), masked_gradient(grad, z, affine, arguments.act(act, alpha, beta)), data(x),
                  data(moments), data(residual), data(residual_moments), sums.mutable_data_ptr()});
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_coefficients(const Tensor& sums, int64_t branch, const Tensor& moments,
                                                           const OptionalTensor& weight, double eps, int64_t count,
                                                           bool batch_stats) {
  const ChannelArguments arguments("batch_norm_coefficients", moments);
  if (branch != 0 && branch != 1) arguments.fail("branch", "a value of 0 or 1", std::to_string(branch));
  // the sums of one branch, or of two
  arguments.check_channels("sums", sums, branch == 1 || (sums.dim() == 2 && sums.size(0) == 4) ? 4 : 2);
  const Parameter weights = arguments.parameter("weight", weight);
  Tensor grad_weight = empty_channels(arguments), grad_bias = empty_channels(arguments);
  Tensor coefficients = empty_rows(arguments, batch_stats ? 4 : 1);
  const DType dtype = dtype_of(arguments.accumulator());
  const char* sums_of_branch =
      static_cast<const char*>(data(sums)) + 2 * branch * arguments.channels() * itemsize(dtype);
  engine::batch_norm_coefficients(
      arguments, {dtype, arguments.channels(), sums_of_branch, data(moments), weights, eps, count, batch_stats,
                  grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr(), coefficients.mutable_data_ptr()});
  return {grad_weight, grad_bias, coefficients};
}

// Coefficients have four rows, or one where the statistics were not the batch's own.
int64_t coefficient_rows(const OptionalTensor& t) { return t.has_value() && t->dim() == 2 && t->size(0) == 1 ? 1 : 4; }
Coefficients coefficients_of(const OptionalTensor& t) { return {data(t), coefficient_rows(t) == 4}; }

// What both forms of backward have: the gradient of the branch that x is in, checked, without outputs.
BatchNormActBackward backward_of(const Arguments& arguments, const Tensor& grad, const Tensor& x, const Tensor& affine,
                                 const Tensor& coefficients, const OptionalTensor& z, const Act& act) {
  arguments.check_like("grad", grad);
  arguments.check_channels("affine", affine, 2);
  arguments.check_channels("coefficients", coefficients, coefficient_rows(coefficients));
  if (z.has_value()) arguments.check_like("z", *z);
  BatchNormActBackward op{};
  op.image = arguments.image();
  op.gradient = masked_gradient(grad, z, affine, act);
  op.x = data(x);
  op.coefficients = coefficients_of(coefficients);
  return op;
}

std::tuple<Tensor, Tensor> batch_norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& affine,
                                                   const Tensor& coefficients, const OptionalTensor& z,
                                                   const OptionalTensor& residual,
                                                   const OptionalTensor& residual_coefficients, int64_t act,
                                                   double alpha, double beta, int64_t masked_channels,
                                                   int64_t masked_channel) {
  const Arguments arguments("batch_norm_act_backward", "x", x);
  BatchNormActBackward op = backward_of(arguments, grad, x, affine, coefficients, z, arguments.act(act, alpha, beta));
  if (residual.has_value()) arguments.check_like("residual", *residual);
  arguments.check_partner("residual_coefficients", residual_coefficients, coefficient_rows(residual_coefficients),
                          "residual", residual);
  arguments.check_value("masked_channels", masked_channels, arguments.channels());
  arguments.check_value("masked_channel", masked_channel, arguments.channels() - masked_channels);

  Tensor dx = empty_beside(x);
  OptionalTensor second;
  op.dx = dx.mutable_data_ptr();
  if (residual.has_value()) {
    second = empty_beside(grad);
    op.residual = data(residual);
    op.residual_coefficients = coefficients_of(residual_coefficients);
    op.residual_dx = second->mutable_data_ptr();
  } else if (masked_channels != 0) {
    second = empty_part(arguments, grad, masked_channels);
    op.masked = second->mutable_data_ptr();
    op.masked_part = {masked_channel, masked_channels};
  }
  engine::batch_norm_act_backward(arguments, op);
  return {dx, second.has_value() ? *second : nothing(grad)};
}

// The gradient's memory becomes that of dx: one tensor less to allocate, and every line written is in the cache.  The
// activation costs its own writes alone, since x is being read.
Tensor batch_norm_act_backward_(const Tensor& grad, const Tensor& x, const Tensor& affine, const Tensor& coefficients,
                                const OptionalTensor& z, int64_t act, double alpha, double beta,
                                bool wants_activation) {
  const Arguments arguments("batch_norm_act_backward_", "x", x);
  BatchNormActBackward op = backward_of(arguments, grad, x, affine, coefficients, z, arguments.act(act, alpha, beta));
  if (wants_activation && z.has_value()) arguments.fail("z", "no value where wants_activation is true", "a tensor");
  Tensor activation = wants_activation ? empty_beside(x) : nothing(x);
  op.dx = grad.mutable_data_ptr();
  op.z = wants_activation ? activation.mutable_data_ptr() : nullptr;
  engine::batch_norm_act_backward(arguments, op);
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
