#include <algorithm>
#include <vector>

#include "strips.h"

namespace fused_resnet {
namespace {

// The mask of both passes.
cpu::MaskedGradient masked_gradient(const MaskedGradient& gradient, const cpu::ChannelRows& affine) {
  const cpu::Mask mask = gradient.act.kind == ActKind::kNone   ? cpu::Mask::kNone
                         : gradient.act.kind != ActKind::kRelu ? cpu::Mask::kActivation
                         : gradient.z != nullptr               ? cpu::Mask::kOutput
                                                               : cpu::Mask::kPreactivation;
  return {gradient.grad, mask, gradient.z, affine[0], affine[1], gradient.act};
}

}  // namespace

void engine::batch_norm_act_reduce(const ChannelArguments&, const BatchNormActReduce& op) {
  const cpu::Layout layout(op.image);
  const cpu::ChannelRows affine(op.gradient.affine, 2, layout);
  const cpu::ChannelRows mean(op.mean, 1, layout), residual_mean(op.residual_mean, 1, layout);
  const cpu::MaskedGradient gradient = masked_gradient(op.gradient, affine);
  const bool two = op.residual_mean != nullptr;
  const int64_t channels = op.image.channels, rows = two ? 3 : 2;  // ΣG is the same for both branches
  const std::vector<double> total = cpu::sum_over_tiles(layout, rows, [&](double* sums, cpu::Tile tile) {
    cpu::kernels().batch_norm_act_reduce({layout.activation, gradient, op.x, mean[0], op.residual, residual_mean[0],
                                          sums, sums + channels, sums + 2 * channels},
                                         tile);
  });
  cpu::visit_accumulator(op.image.dtype, [&](auto accumulator) {
    auto* out = static_cast<decltype(accumulator)*>(op.sums);
    out = std::copy(total.begin(), total.begin() + 2 * channels, out);
    if (!two) return;
    out = std::copy(total.begin(), total.begin() + channels, out);
    std::copy(total.begin() + 2 * channels, total.end(), out);
  });
}

void engine::batch_norm_coefficients(const ChannelArguments&, const BatchNormCoefficients& op) {
  const cpu::ParameterValues weight(op.weight, op.channels);
  cpu::visit_accumulator(op.dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    const A* sum_grad = static_cast<const A*>(op.sums);
    const A* mean = static_cast<const A*>(op.moments);
    cpu::finish_coefficients(sum_grad, sum_grad + op.channels, mean, mean + op.channels, weight.get(), op.eps, op.count,
                             op.batch_stats, op.channels, static_cast<A*>(op.grad_weight),
                             static_cast<A*>(op.grad_bias), static_cast<A*>(op.coefficients));
  });
}

void engine::batch_norm_act_backward(const ChannelArguments&, const BatchNormActBackward& op) {
  const cpu::Layout layout(op.image);
  const auto rows_of = [](const Coefficients& coefficients) { return coefficients.batch_stats ? 4 : 1; };
  const cpu::ChannelRows affine(op.gradient.affine, 2, layout);
  const cpu::ChannelRows first(op.coefficients.rows, rows_of(op.coefficients), layout);
  const cpu::ChannelRows other(op.residual_coefficients.rows, rows_of(op.residual_coefficients), layout);
  const bool has_part = op.masked != nullptr && op.masked_part.count < op.image.channels;
  // neither a dx in place, whose lines are in the caches, nor a strip, which is read again at once
  const bool stream = layout.streams({op.dx == op.gradient.grad ? nullptr : op.dx, op.masked, op.residual_dx, op.z}) &&
                      !(has_part && op.image.channels_last);
  const cpu::BatchNormActBackward pass = {
      layout.activation,
      masked_gradient(op.gradient, affine),
      op.x,
      {first[0], first[1], first[2], first[3]},
      op.dx,
      op.masked,
      op.residual,
      {other[0], other[1], other[2], other[3]},
      op.residual_dx,
      op.z,
      stream,
  };
  cpu::parallel_for_rows(layout.activation, [&](cpu::Range rows) {
    if (!has_part) return cpu::kernels().batch_norm_act_backward(pass, rows);
    cpu::for_each_strip<true>(layout, op.masked_part, op.masked, rows, [&](cpu::Range strip, void* beside) {
      cpu::BatchNormActBackward part = pass;
      part.masked = beside;
      cpu::kernels().batch_norm_act_backward(part, strip);
    });
  });
}

}  // namespace fused_resnet
