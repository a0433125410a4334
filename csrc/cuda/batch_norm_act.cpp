#include "device.h"

namespace fused_resnet {

void engine::batch_norm_act(const Arguments& arguments, const Tensor& x, const Tensor& affine,
                            const OptionalTensor& residual, const OptionalTensor& residual_affine, bool relu,
                            int64_t residual_channel, const Tensor& z) {
  const Device device(arguments);
  const cuda::BatchNormAct op = {
      matrix_of(arguments),
      data(x),
      floats(affine),
      data(residual),
      floats(residual_affine),
      z.mutable_data_ptr(),
      relu,
      {residual_channel, residual.has_value() ? residual->size(1) : 0},
  };
  device.check(cuda::batch_norm_act(device.launch(), op));
}

}  // namespace fused_resnet
