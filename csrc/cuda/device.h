// Where a call's kernels are launched, and how they see its tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "kernels.h"
#include "ops/allocation.h"

namespace fused_resnet {

// The device of a call's arguments, made the current one, and torch's stream there.
class Device {
 public:
  explicit Device(const ChannelArguments& arguments)
      : arguments_(arguments), index_(arguments.anchor().get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    launch_.stream = static_cast<cudaStream_t>(stream);
    check(cudaDeviceGetAttribute(&launch_.multiprocessors, cudaDevAttrMultiProcessorCount, index_));
  }

  const cuda::Launch& launch() const { return launch_; }

  // What a launch returned.
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    arguments_.fail(std::string("the launch on device ") + describe_device(arguments_.anchor()) +
                    " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
  }

  // How a reduction of these activations, whose rows begin at the pointers, is cut.
  cuda::Plan reduction_plan(const cuda::Matrix& matrix, std::initializer_list<const void*> pointers) const {
    return cuda::reduction_plan(matrix, cuda::vector_width(matrix, pointers), launch_.multiprocessors);
  }

 private:
  const ChannelArguments& arguments_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Launch launch_{};
};

inline cuda::Matrix matrix_of(const Arguments& arguments) {
  const Sizes s = arguments.sizes();
  return {arguments.dtype(), s[0] * s[2] * s[3], s[1]};
}

inline cuda::Parameter parameter(const OptionalTensor& t) {
  if (!t.has_value()) return {nullptr, DType::kFloat32, 0};
  return {data(t), dtype_of(t->scalar_type()), t->stride(0)};
}

inline const float* floats(const Tensor& t) { return static_cast<const float*>(data(t)); }
inline const float* floats(const OptionalTensor& t) { return static_cast<const float*>(data(t)); }
inline float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// What the parts of a reduction leave: [rows, parts, C].
inline Tensor empty_partial(const Arguments& arguments, const cuda::Plan& plan, int64_t rows, ScalarType dtype) {
  return empty(arguments.anchor(), {rows, plan.parts, plan.channels}, {plan.parts * plan.channels, plan.channels, 1},
               dtype);
}

}  // namespace fused_resnet
