// What the arguments of batch norm, ReLU and residual add must be, whichever engine serves them.
#pragma once

#include "arguments.h"

namespace fused_resnet {

// Coefficients have four rows, or one where the statistics were not the batch's own.
inline int64_t coefficient_rows(const OptionalTensor& t) {
  return t.has_value() && t->dim() == 2 && t->size(0) == 1 ? 1 : 4;
}

inline void check_batch_norm_act(const Arguments& arguments, const Tensor& affine, const OptionalTensor& residual,
                                 const OptionalTensor& residual_affine, int64_t residual_channel) {
  arguments.check_channels("affine", affine, 2);
  if (residual.has_value() && !residual_affine.has_value()) {
    arguments.check_part("residual", *residual, "residual_channel", residual_channel);
  } else {
    if (residual.has_value()) arguments.check_like("residual", *residual);
    arguments.check_value("residual_channel", residual_channel, 0);
  }
  if (residual_affine.has_value()) arguments.check_partner("residual_affine", residual_affine, 2, "residual", residual);
}

inline void check_reduce(const Arguments& arguments, const Tensor& grad, const Tensor& moments, const Tensor& affine,
                         const OptionalTensor& z, const OptionalTensor& residual,
                         const OptionalTensor& residual_moments) {
  arguments.check_like("grad", grad);
  arguments.check_channels("moments", moments, 3);
  arguments.check_channels("affine", affine, 2);
  if (z.has_value()) arguments.check_like("z", *z);
  if (residual.has_value()) arguments.check_like("residual", *residual);
  arguments.check_partner("residual_moments", residual_moments, 3, "residual", residual);
}

// The sums of one branch, or of two.
inline void check_sums(const ChannelArguments& arguments, const Tensor& sums, int64_t branch) {
  if (branch != 0 && branch != 1) arguments.fail("branch", "a value of 0 or 1", std::to_string(branch));
  arguments.check_channels("sums", sums, branch == 1 || (sums.dim() == 2 && sums.size(0) == 4) ? 4 : 2);
}

inline void check_backward(const Arguments& arguments, const Tensor& grad, const Tensor& affine,
                           const Tensor& coefficients, const OptionalTensor& z, const OptionalTensor& residual,
                           const OptionalTensor& residual_coefficients, int64_t masked_channels = 0,
                           int64_t masked_channel = 0) {
  arguments.check_like("grad", grad);
  arguments.check_channels("affine", affine, 2);
  arguments.check_channels("coefficients", coefficients, coefficient_rows(coefficients));
  if (z.has_value()) arguments.check_like("z", *z);
  if (residual.has_value()) arguments.check_like("residual", *residual);
  arguments.check_partner("residual_coefficients", residual_coefficients, coefficient_rows(residual_coefficients),
                          "residual", residual);
  arguments.check_value("masked_channels", masked_channels, arguments.channels());
  arguments.check_value("masked_channel", masked_channel, arguments.channels() - masked_channels);
}

inline void check_backward_in_place(const Arguments& arguments, const Tensor& grad, const Tensor& affine,
                                    const Tensor& coefficients, const OptionalTensor& z, bool wants_activation) {
  check_backward(arguments, grad, affine, coefficients, z, std::nullopt, std::nullopt);
  if (wants_activation && z.has_value()) arguments.fail("z", "no value where wants_activation is true", "a tensor");
}

inline void check_masked_grad(const Arguments& arguments, const OptionalTensor& other, const Tensor& z) {
  if (other.has_value()) arguments.check_like("other", *other);
  arguments.check_like("z", z);
}

inline void check_add_masked(const Arguments& arguments, const Tensor& grad, const OptionalTensor& z, bool relu) {
  arguments.check_like("grad", grad);
  if (relu && !z.has_value()) arguments.fail("z", "a tensor where relu is true", "none");
  if (z.has_value()) arguments.check_like("z", *z);
}

}  // namespace fused_resnet
