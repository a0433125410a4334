#include <algorithm>
#include <vector>

#include "layout.h"

namespace fused_resnet {

void engine::masked_grad(const ChannelArguments&, const MaskedGrad& op) {
  const cpu::Layout layout(op.image);
  // in place every line written is in the caches
  const bool stream = op.masked != op.grad && layout.streams({op.masked});
  const std::vector<double> total = cpu::sum_over_tiles(layout, 1, [&](double* sums, cpu::Tile tile) {
    cpu::kernels().masked_grad({layout.activation, op.grad, op.other, op.z, op.masked, sums, stream}, tile);
  });
  cpu::visit_accumulator(op.image.dtype, [&](auto accumulator) {
    std::copy(total.begin(), total.end(), static_cast<decltype(accumulator)*>(op.sums));
  });
}

void engine::add_masked(const ChannelArguments&, const AddMasked& op) {
  const cpu::Layout layout(op.image);
  const cpu::AddMasked pass = {layout.activation, op.grad, op.z, op.dx};
  cpu::parallel_for_rows(layout.activation, [&](cpu::Range rows) { cpu::kernels().add_masked(pass, rows); });
}

}  // namespace fused_resnet
