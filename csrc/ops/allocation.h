// What the operations return, allocated as torch does, in the shape and memory format of their arguments.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>

#include "arguments.h"

namespace fused_resnet {

// Memory as torch.empty gives it (filled with NaN in deterministic mode, which the direct way to the allocator would
// skip), seen with these sizes and strides.
inline Tensor empty(const Tensor& like, const Sizes& sizes, const Sizes& strides, ScalarType dtype) {
  int64_t numel = 1;
  for (int64_t size : sizes) numel *= size;
  int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_aten_new_empty(like.get(), &numel, 1, &code, nullptr, nullptr, 0, nullptr, &handle));
  const Tensor memory(handle);
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_beside(const Tensor& t) {
  return empty(t, sizes_of(t), {t.strides().begin(), t.strides().end()}, t.scalar_type());
}

// [N, C, H, W] in the memory format of the arguments.
inline Tensor empty_image(const Arguments& arguments, const Sizes& s, ScalarType dtype) {
  const Sizes strides = arguments.channels_last() ? Sizes{s[1] * s[2] * s[3], 1, s[3] * s[1], s[1]}
                                                  : Sizes{s[1] * s[2] * s[3], s[2] * s[3], s[3], 1};
  return empty(arguments.anchor(), s, strides, dtype);
}

// As `t`, one of the arguments, is, with the first `channels` of its channels.
inline Tensor empty_part(const Arguments& arguments, const Tensor& t, int64_t channels) {
  if (channels == arguments.channels()) return empty_beside(t);
  Sizes sizes = arguments.sizes();
  sizes[1] = channels;
  return empty_image(arguments, sizes, t.scalar_type());
}

// [rows, C] of accumulators.
inline Tensor empty_rows(const ChannelArguments& arguments, int64_t rows) {
  const int64_t channels = arguments.channels();
  return empty(arguments.anchor(), {rows, channels}, {channels, 1}, arguments.accumulator());
}

// [C] of accumulators.
inline Tensor empty_channels(const ChannelArguments& arguments) {
  return empty(arguments.anchor(), {arguments.channels()}, {1}, arguments.accumulator());
}

// What is returned in the place of an output that was not asked for.
inline Tensor nothing(const Tensor& like) { return empty(like, {0}, {1}, like.scalar_type()); }

}  // namespace fused_resnet
