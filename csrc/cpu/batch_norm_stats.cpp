#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "channel_values.h"
#include "layout.h"

namespace fused_resnet {

void engine::batch_norm_stats(const Arguments& arguments, const Tensor& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, double eps, const Tensor& moments, const Tensor& affine) {
  const Layout layout(arguments);
  const int64_t channels = arguments.channels(), parts = reduction_parts(layout);
  const size_t size = static_cast<size_t>(std::max<int64_t>(parts, 1) * channels);
  const std::unique_ptr<double[]> means(new double[size]), m2s(new double[size]);
  parallel_for_tiles(layout, [&](int64_t part, Tile tile) {
    const int64_t offset = part * channels;
    kernels().batch_norm_stats({layout.activation, data(x), means.get() + offset, m2s.get() + offset}, tile);
  });

  std::vector<int64_t> counts;
  if (layout.activation.planes && layout.activation.numel != 0) counts = {layout.activation.numel / channels};
  for (int64_t row = 0; !layout.activation.planes && row < layout.activation.rows(); row += layout.plan.row_tile) {
    counts.push_back(layout.activation.pixels({row, std::min(row + layout.plan.row_tile, layout.activation.rows())}));
  }
  std::vector<double> mean(static_cast<size_t>(channels)), var(static_cast<size_t>(channels));
  merge_moments(means.get(), m2s.get(), counts.data(), static_cast<int64_t>(counts.size()), channels, mean.data(),
                var.data());
  const double count = std::accumulate(counts.begin(), counts.end(), 0.0);
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    auto* out = static_cast<decltype(accumulator)*>(moments.mutable_data_ptr());
    out = std::copy(mean.begin(), mean.end(), out);
    out = std::copy(var.begin(), var.end(), out);
    std::transform(var.begin(), var.end(), out, [&](double v) { return v * (count / std::max(count - 1, 1.0)); });
  });
  engine::batch_norm_affine(arguments, moments, weight, bias, eps, affine);
}

void engine::batch_norm_affine(const ChannelArguments& arguments, const Tensor& moments, const OptionalTensor& weight,
                               const OptionalTensor& bias, double eps, const Tensor& affine) {
  const Parameter weights(weight), biases(bias);
  const int64_t channels = arguments.channels();
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    using A = decltype(accumulator);
    const A* mean = static_cast<const A*>(data(moments));
    A* scale = static_cast<A*>(affine.mutable_data_ptr());
    finish_affine(mean, mean + channels, weights.get(), biases.get(), eps, channels, scale, scale + channels);
  });
}

}  // namespace fused_resnet
