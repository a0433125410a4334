#include <algorithm>
#include <vector>

#include "channel_values.h"
#include "strips.h"

namespace fused_resnet {

namespace {

// The mask of both backward passes.
MaskedGradient masked_gradient(const Tensor& grad, const OptionalTensor& z, const ChannelRows& affine, bool relu) {
  const Mask mask = !relu ? Mask::kNone : z.has_value() ? Mask::kOutput : Mask::kPreactivation;
  return {data(grad), mask, data(z), affine[0], affine[1]};
}

}  // namespace

void engine::batch_norm_act_reduce(const Arguments& arguments, const Tensor& grad, const Tensor& x,
                                   const Tensor& moments, const Tensor& affine, const OptionalTensor& z,
                                   const OptionalTensor& residual, const OptionalTensor& residual_moments, bool relu,
                                   const Tensor& sums) {
  const Layout layout(arguments);
  const ChannelRows means(moments, layout), residual_means(residual_moments, layout), scale_shift(affine, layout);
  const MaskedGradient gradient = masked_gradient(grad, z, scale_shift, relu);

  const int64_t channels = arguments.channels();
  const int64_t rows = residual.has_value() ? 3 : 2;  // ΣG is the same for both branches
  const std::vector<double> total = sum_over_tiles(layout, rows, [&](double* partial, Tile tile) {
    kernels().batch_norm_act_reduce({layout.activation, gradient, data(x), means[0], data(residual), residual_means[0],
                                     partial, partial + channels, partial + 2 * channels},
                                    tile);
  });
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    auto* out = static_cast<decltype(accumulator)*>(sums.mutable_data_ptr());
    out = std::copy(total.begin(), total.begin() + 2 * channels, out);
    if (residual.has_value()) {
      out = std::copy(total.begin(), total.begin() + channels, out);
      std::copy(total.begin() + 2 * channels, total.end(), out);
    }
  });
}

void engine::batch_norm_coefficients(const ChannelArguments& arguments, const Tensor& sums, int64_t branch,
                                     const Tensor& moments, const OptionalTensor& weight, double eps, int64_t count,
                                     bool batch_stats, const Tensor& grad_weight, const Tensor& grad_bias,
                                     const Tensor& coefficients) {
  const Parameter weights(weight);
  const int64_t channels = arguments.channels();
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    using A = decltype(accumulator);
    const A* sum_grad = static_cast<const A*>(data(sums)) + 2 * branch * channels;
    const A* mean = static_cast<const A*>(data(moments));
    finish_coefficients(sum_grad, sum_grad + channels, mean, mean + channels, weights.get(), eps, count, batch_stats,
                        channels, static_cast<A*>(grad_weight.mutable_data_ptr()),
                        static_cast<A*>(grad_bias.mutable_data_ptr()),
                        static_cast<A*>(coefficients.mutable_data_ptr()));
  });
}

void engine::batch_norm_act_backward(const Arguments& arguments, const Tensor& grad, const Tensor& x,
                                     const Tensor& affine, const Tensor& coefficients, const OptionalTensor& z,
                                     const OptionalTensor& residual, const OptionalTensor& residual_coefficients,
                                     bool relu, const BackwardOutputs& outputs) {
  const Layout layout(arguments);
  const ChannelRows scale_shift(affine, layout), first(coefficients, layout), other(residual_coefficients, layout);
  const ChannelPart masked_part = outputs.masked_part;
  const bool has_part = outputs.masked != nullptr && masked_part.count < arguments.channels();
  // neither a dx in place, whose lines are in the caches, nor a strip, which is read again at once
  const bool stream = layout.streams({outputs.dx == data(grad) ? nullptr : outputs.dx, outputs.residual_dx,
                                      outputs.masked, outputs.activation},
                                     x.scalar_type()) &&
                      !(has_part && arguments.channels_last());
  const BatchNormActBackward op = {
      layout.activation,
      masked_gradient(grad, z, scale_shift, relu),
      data(x),
      {first[0], first[1], first[2], first[3]},
      outputs.dx,
      outputs.masked,
      data(residual),
      {other[0], other[1], other[2], other[3]},
      outputs.residual_dx,
      outputs.activation,
      relu,
      stream,
  };
  parallel_for_rows(layout.activation, [&](Range rows) {
    if (!has_part) return kernels().batch_norm_act_backward(op, rows);
    for_each_strip<true>(layout, masked_part, itemsize(x.scalar_type()), outputs.masked, rows,
                         [&](Range strip, void* beside) {
                           BatchNormActBackward part = op;
                           part.masked = beside;
                           kernels().batch_norm_act_backward(part, strip);
                         });
  });
}

}  // namespace fused_resnet
