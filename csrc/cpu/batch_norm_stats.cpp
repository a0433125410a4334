#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "layout.h"

namespace fused_resnet {

void engine::batch_norm_stats(const ChannelArguments& arguments, const BatchNormStats& op) {
  const cpu::Layout layout(op.image);
  const int64_t channels = op.image.channels, parts = cpu::reduction_parts(layout);
  const size_t size = static_cast<size_t>(std::max<int64_t>(parts, 1) * channels);
  const std::unique_ptr<double[]> means(new double[size]), m2s(new double[size]);
  cpu::parallel_for_tiles(layout, [&](int64_t part, cpu::Tile tile) {
    const int64_t offset = part * channels;
    cpu::kernels().batch_norm_stats({layout.activation, op.x, means.get() + offset, m2s.get() + offset}, tile);
  });

  std::vector<int64_t> counts;
  if (layout.activation.planes && layout.activation.numel != 0) counts = {layout.activation.numel / channels};
  for (int64_t row = 0; !layout.activation.planes && row < layout.activation.rows(); row += layout.plan.row_tile) {
    counts.push_back(layout.activation.pixels({row, std::min(row + layout.plan.row_tile, layout.activation.rows())}));
  }
  std::vector<double> mean(static_cast<size_t>(channels)), var(static_cast<size_t>(channels));
  cpu::merge_moments(means.get(), m2s.get(), counts.data(), static_cast<int64_t>(counts.size()), channels, mean.data(),
                     var.data());
  const double count = std::accumulate(counts.begin(), counts.end(), 0.0);
  cpu::visit_accumulator(op.image.dtype, [&](auto accumulator) {
    auto* out = static_cast<decltype(accumulator)*>(op.moments);
    out = std::copy(mean.begin(), mean.end(), out);
    out = std::copy(var.begin(), var.end(), out);
    std::transform(var.begin(), var.end(), out, [&](double v) { return v * (count / std::max(count - 1, 1.0)); });
  });
  engine::batch_norm_affine(arguments, {op.image.dtype, channels, op.moments, op.weight, op.bias, op.eps, op.affine});
}

void engine::batch_norm_affine(const ChannelArguments&, const BatchNormAffine& op) {
  const cpu::ParameterValues weight(op.weight, op.channels), bias(op.bias, op.channels);
  cpu::visit_accumulator(op.dtype, [&](auto accumulator) {
    using A = decltype(accumulator);
    const A* mean = static_cast<const A*>(op.moments);
    A* scale = static_cast<A*>(op.affine);
    cpu::finish_affine(mean, mean + op.channels, weight.get(), bias.get(), op.eps, op.channels, scale,
                       scale + op.channels);
  });
}

}  // namespace fused_resnet
