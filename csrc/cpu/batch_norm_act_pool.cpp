// Batch norm, activation and max pool in one pass, and the pool's backward, which the CUDA engine leaves to Triton.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "layout.h"
#include "ops/allocation.h"

namespace fused_resnet::cpu {
namespace {

void check_window(const Arguments& arguments, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding) {
  const auto check = [&](const char* name, const Sizes& values, int64_t least) {
    if (values.size() == 2 && values[0] >= least && values[1] >= least) return;
    arguments.fail(name, "two values, each at least " + std::to_string(least), to_string(values));
  };
  check("kernel_size", kernel_size, 1);
  check("stride", stride, 1);
  check("padding", padding, 0);
  if (kernel_size[0] > 256 || kernel_size[1] > 256 || kernel_size[0] * kernel_size[1] > 256) {
    arguments.fail("kernel_size", "at most 256 elements, since an index is one byte", to_string(kernel_size));
  }
  if (padding[0] > kernel_size[0] / 2 || padding[1] > kernel_size[1] / 2) {
    arguments.fail("padding", "at most half of kernel_size, " + to_string(kernel_size), to_string(padding));
  }
}

PoolShape pool_shape(const Arguments& arguments, const Sizes& size, const Sizes& kernel_size, const Sizes& stride,
                     const Sizes& padding) {
  PoolShape shape{};
  const Sizes s = arguments.sizes();
  shape.dtype = arguments.dtype();
  shape.images = arguments.channels_last() ? s[0] : s[0] * s[1];
  shape.channels = arguments.channels_last() ? s[1] : 1;
  shape.planes = arguments.channels_last() ? 0 : s[1];
  shape.height = size[0];
  shape.width = size[1];
  for (size_t i = 0; i < 2; ++i) {
    shape.kernel[i] = kernel_size[i];
    shape.stride[i] = stride[i];
    shape.padding[i] = padding[i];
    const int64_t room = size[i] + 2 * padding[i] - kernel_size[i];
    if (room < 0) {
      arguments.fail("kernel_size", "at most the padded size of the image, " + to_string(size), to_string(kernel_size));
    }
    (i == 0 ? shape.out_height : shape.out_width) = room / stride[i] + 1;
  }
  return shape;
}

std::tuple<Tensor, Tensor> batch_norm_act_pool(const Tensor& x, const Tensor& affine, int64_t act, double alpha,
                                               double beta, const Sizes& kernel_size, const Sizes& stride,
                                               const Sizes& padding) {
  const Arguments arguments("batch_norm_act_pool", "x", x);
  arguments.check_channels("affine", affine, 2);
  check_window(arguments, kernel_size, stride, padding);
  const PoolShape shape = pool_shape(arguments, {x.size(2), x.size(3)}, kernel_size, stride, padding);
  const Sizes out_sizes = {x.size(0), x.size(1), shape.out_height, shape.out_width};
  Tensor z = empty_image(arguments, out_sizes, x.scalar_type());
  Tensor index = empty_image(arguments, out_sizes, ScalarType::Byte);

  const int64_t size = accumulator_size(arguments.dtype());
  const char* scale = static_cast<const char*>(data(affine));
  const BatchNormActPool op = {
      shape,
      data(x),
      scale,
      scale + arguments.channels() * size,
      z.mutable_data_ptr(),
      static_cast<uint8_t*>(index.mutable_data_ptr()),
      arguments.act(act, alpha, beta),
  };
  const int64_t pitch = shape.width * shape.channels;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, pitch * shape.stride[0]));
  torch::stable::parallel_for(0, shape.images * shape.out_height, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(shape.kernel[0] * pitch * size)]);
    kernels().batch_norm_act_pool(op, {begin, end}, scratch.get());
  });
  return {z, index};
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& index, const Sizes& size, const Sizes& kernel_size,
                         const Sizes& stride, const Sizes& padding) {
  const Arguments arguments("max_pool_backward", "grad", grad);
  arguments.check_like("index", index, ScalarType::Byte);
  check_window(arguments, kernel_size, stride, padding);
  if (size.size() != 2) arguments.fail("size", "two values [H, W]", to_string(size));
  const PoolShape shape = pool_shape(arguments, size, kernel_size, stride, padding);
  if (shape.out_height != grad.size(2) || shape.out_width != grad.size(3)) {
    arguments.fail("grad", "the pooled size, " + to_string({shape.out_height, shape.out_width}),
                   to_string({grad.size(2), grad.size(3)}));
  }
  Tensor dx = empty_image(arguments, {grad.size(0), grad.size(1), size[0], size[1]}, grad.scalar_type());
  const MaxPoolBackward op = {shape, data(grad), static_cast<const uint8_t*>(data(index)), dx.mutable_data_ptr()};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, shape.width * shape.channels));
  torch::stable::parallel_for(0, shape.images * shape.height, grain,
                              [&](int64_t begin, int64_t end) { kernels().max_pool_backward(op, {begin, end}); });
  return dx;
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("batch_norm_act_pool", TORCH_BOX(&fused_resnet::cpu::batch_norm_act_pool));
  m.impl("max_pool_backward", TORCH_BOX(&fused_resnet::cpu::max_pool_backward));
}
