#include "strips.h"

namespace fused_resnet {

void engine::batch_norm_act(const ChannelArguments&, const BatchNormAct& op) {
  const cpu::Layout layout(op.image);
  const cpu::ChannelRows affine(op.affine, 2, layout), residual_affine(op.residual_affine, 2, layout);
  // in place every line written is in the caches
  const bool stream = op.z != op.x && layout.streams({op.z});
  const cpu::BatchNormAct pass = {layout.activation,  op.x, affine[0], affine[1], op.residual, residual_affine[0],
                                  residual_affine[1], op.z, op.act,    stream};
  const bool has_part = op.residual != nullptr && op.residual_part.count < op.image.channels;
  cpu::parallel_for_rows(layout.activation, [&](cpu::Range rows) {
    if (!has_part) return cpu::kernels().batch_norm_act(pass, rows);
    cpu::for_each_strip<false>(layout, op.residual_part, op.residual, rows, [&](cpu::Range strip, const void* beside) {
      cpu::BatchNormAct part = pass;
      part.residual = beside;
      cpu::kernels().batch_norm_act(part, strip);
    });
  });
}

}  // namespace fused_resnet
