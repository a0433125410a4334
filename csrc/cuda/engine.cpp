// The CUDA engine, on torch's stable ABI: where its kernels are launched.  Nothing here waits for the GPU, and all
// memory is torch's, so that a CUDA graph can capture every operation.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "kernels.h"
#include "ops/allocation.h"

namespace fused_resnet {

const Engine kEngine = {
    aoti_torch_device_type_cuda(), {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, false};

namespace {

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

  template <typename Op>
  void run(cudaError_t (*kernel)(const cuda::Launch&, const Op&), const Op& op) const {
    check(kernel(launch_, op));
  }

  // One that reads the tensors at `pointers` and leaves so many values a channel and part.
  template <typename Op, typename P>
  void reduce(cudaError_t (*kernel)(const cuda::Launch&, const cuda::Reduction<Op, P>&), const Op& op,
              std::initializer_list<const void*> pointers, int64_t values) const {
    const cuda::Matrix matrix = cuda::matrix_of(op.image);
    const cuda::Plan plan = cuda::reduction_plan(matrix, cuda::vector_width(matrix, pointers), launch_.multiprocessors);
    const int64_t channels = plan.channels;
    const Tensor partial =
        empty(arguments_.anchor(), {values, plan.parts, channels}, {plan.parts * channels, channels, 1},
              std::is_same_v<P, double> ? ScalarType::Double : ScalarType::Float);
    check(kernel(launch_, {plan, op, static_cast<P*>(partial.mutable_data_ptr())}));
  }

 private:
  // What a launch returned.
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    arguments_.fail(std::string("the launch on device ") + describe_device(arguments_.anchor()) +
                    " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
  }

  const ChannelArguments& arguments_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Launch launch_{};
};

}  // namespace

// The values of a part are mean and M2 here, sums below.
void engine::batch_norm_stats(const ChannelArguments& arguments, const BatchNormStats& op) {
  Device(arguments).reduce(cuda::batch_norm_stats, op, {op.x}, 2);
}

void engine::batch_norm_affine(const ChannelArguments& arguments, const BatchNormAffine& op) {
  Device(arguments).run(cuda::batch_norm_affine, op);
}

void engine::batch_norm_act(const ChannelArguments& arguments, const BatchNormAct& op) {
  Device(arguments).run(cuda::batch_norm_act, op);
}

void engine::batch_norm_act_reduce(const ChannelArguments& arguments, const BatchNormActReduce& op) {
  // ΣG is the same for both branches
  Device(arguments).reduce(
      cuda::batch_norm_act_reduce, op,
      {op.gradient.grad, op.gradient.z, op.gradient.affine, op.x, op.mean, op.residual, op.residual_mean},
      op.residual_mean != nullptr ? 3 : 2);
}

void engine::batch_norm_coefficients(const ChannelArguments& arguments, const BatchNormCoefficients& op) {
  Device(arguments).run(cuda::batch_norm_coefficients, op);
}

void engine::batch_norm_act_backward(const ChannelArguments& arguments, const BatchNormActBackward& op) {
  Device(arguments).run(cuda::batch_norm_act_backward, op);
}

void engine::masked_grad(const ChannelArguments& arguments, const MaskedGrad& op) {
  Device(arguments).reduce(cuda::masked_grad, op, {op.grad, op.other, op.z, op.masked}, 1);
}

void engine::add_masked(const ChannelArguments& arguments, const AddMasked& op) {
  Device(arguments).run(cuda::add_masked, op);
}

}  // namespace fused_resnet
