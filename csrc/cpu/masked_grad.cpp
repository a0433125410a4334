#include <algorithm>
#include <vector>

#include "channel_values.h"
#include "layout.h"

namespace fused_resnet {

void engine::masked_grad(const Arguments& arguments, const Tensor& grad, const OptionalTensor& other, const Tensor& z,
                         const Tensor& masked, const Tensor& sum_grad) {
  const Layout layout(arguments);
  // in place every line written is in the caches
  const bool stream = data(masked) != data(grad) && layout.streams({data(masked)}, grad.scalar_type());
  const std::vector<double> total = sum_over_tiles(layout, 1, [&](double* partial, Tile tile) {
    kernels().masked_grad(
        {layout.activation, data(grad), data(other), data(z), masked.mutable_data_ptr(), partial, stream}, tile);
  });
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    std::copy(total.begin(), total.end(), static_cast<decltype(accumulator)*>(sum_grad.mutable_data_ptr()));
  });
}

void engine::add_masked(const Arguments& arguments, const Tensor& grad, const OptionalTensor& z, const Tensor& dx) {
  const Layout layout(arguments);
  const AddMasked op = {layout.activation, data(grad), data(z), dx.mutable_data_ptr()};
  parallel_for_rows(layout.activation, [&](Range rows) { kernels().add_masked(op, rows); });
}

}  // namespace fused_resnet
