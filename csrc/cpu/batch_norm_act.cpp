#include "strips.h"

namespace fused_resnet {

void engine::batch_norm_act(const Arguments& arguments, const Tensor& x, const Tensor& affine,
                            const OptionalTensor& residual, const OptionalTensor& residual_affine, bool relu,
                            int64_t residual_channel, const Tensor& z) {
  const Layout layout(arguments);
  const ChannelRows scale_shift(affine, layout), residual_scale_shift(residual_affine, layout);
  const BatchNormAct op = {
      layout.activation,
      data(x),
      scale_shift[0],
      scale_shift[1],
      data(residual),
      residual_scale_shift[0],
      residual_scale_shift[1],
      z.mutable_data_ptr(),
      relu,
      // in place every line written is in the caches
      data(z) != data(x) && layout.streams({data(z)}, x.scalar_type()),
  };
  const bool has_part = residual.has_value() && residual->size(1) < arguments.channels();
  parallel_for_rows(layout.activation, [&](Range rows) {
    if (!has_part) return kernels().batch_norm_act(op, rows);
    for_each_strip<false>(layout, {residual_channel, residual->size(1)}, itemsize(x.scalar_type()), op.residual, rows,
                          [&](Range strip, const void* beside) {
                            BatchNormAct part = op;
                            part.residual = beside;
                            kernels().batch_norm_act(part, strip);
                          });
  });
}

}  // namespace fused_resnet
