// The CUDA engine of the operations that fused_resnet/ops defines: checks, allocation, launches, registration.
//
// Written against torch's stable ABI, as the CPU engine is.  Nothing here waits for the GPU, and all memory is torch's,
// so that a CUDA graph can capture every operation.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "batch_norm_act_arguments.h"
#include "cuda/kernels.h"

namespace fused_resnet {

const Engine kEngine = {
    aoti_torch_device_type_cuda(), {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}, false};

namespace {

// ---- launches

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

 private:
  const ChannelArguments& arguments_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Launch launch_{};
};

// ---- how the kernels see the arguments

cuda::Matrix matrix_of(const Arguments& arguments) {
  const Sizes s = arguments.sizes();
  return {arguments.dtype(), s[0] * s[2] * s[3], s[1]};
}

cuda::Parameter parameter(const ChannelArguments& arguments, const char* name, const OptionalTensor& t) {
  if (!t.has_value()) return {nullptr, DType::kFloat32, 0};
  check_parameter(arguments, name, *t);
  return {data(*t), dtype_of(t->scalar_type()), t->stride(0)};
}

const float* floats(const Tensor& t) { return static_cast<const float*>(data(t)); }
const float* floats(const OptionalTensor& t) { return static_cast<const float*>(data(t)); }
float* mutable_floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

cuda::Coefficients coefficients_of(const OptionalTensor& t) { return {floats(t), coefficient_rows(t) == 4}; }

cuda::MaskedGradient masked_gradient(const Tensor& grad, const OptionalTensor& z, const Tensor& affine, bool relu) {
  return {data(grad), relu ? data(z) : nullptr, floats(affine), relu};
}

Tensor empty_partial(const ChannelArguments& arguments, const cuda::Plan& plan, int64_t rows, ScalarType dtype) {
  return empty(arguments.anchor(), {rows, plan.parts, plan.channels}, {plan.parts * plan.channels, plan.channels, 1},
               dtype);
}

// ---- the operations

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                            double eps) {
  const Arguments arguments("batch_norm_stats", "x", x);
  const cuda::Parameter weights = parameter(arguments, "weight", weight), biases = parameter(arguments, "bias", bias);
  const Device device(arguments);
  const cuda::Matrix matrix = matrix_of(arguments);
  const cuda::Plan plan =
      cuda::reduction_plan(matrix, cuda::vector_width(matrix, {data(x)}), device.launch().multiprocessors);
  Tensor partial = empty_partial(arguments, plan, 2, ScalarType::Double);
  Tensor moments = empty_rows(arguments, 3), affine = empty_rows(arguments, 2);
  device.check(cuda::batch_norm_stats(device.launch(), {
                                                           plan,
                                                           matrix.dtype,
                                                           data(x),
                                                           weights,
                                                           biases,
                                                           eps,
                                                           static_cast<double*>(partial.mutable_data_ptr()),
                                                           mutable_floats(moments),
                                                           mutable_floats(affine),
                                                       }));
  return {moments, affine};
}

Tensor batch_norm_affine(const Tensor& moments, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const ChannelArguments arguments("batch_norm_affine", moments);
  const cuda::Parameter weights = parameter(arguments, "weight", weight), biases = parameter(arguments, "bias", bias);
  const Device device(arguments);
  Tensor affine = empty_rows(arguments, 2);
  device.check(cuda::batch_norm_affine(
      device.launch(), {arguments.channels(), floats(moments), weights, biases, eps, mutable_floats(affine)}));
  return affine;
}

// z of batch_norm_act into `out`, which is x itself or a tensor beside it.
void apply(const Arguments& arguments, const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
           const OptionalTensor& residual_affine, bool relu, int64_t residual_channel, const Tensor& out) {
  check_batch_norm_act(arguments, affine, residual, residual_affine, residual_channel);
  const Device device(arguments);
  device.check(
      cuda::batch_norm_act(device.launch(), {
                                                matrix_of(arguments),
                                                data(x),
                                                floats(affine),
                                                data(residual),
                                                floats(residual_affine),
                                                out.mutable_data_ptr(),
                                                relu,
                                                {residual_channel, residual.has_value() ? residual->size(1) : 0},
                                            }));
}

Tensor batch_norm_act(const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
                      const OptionalTensor& residual_affine, bool relu, int64_t residual_channel) {
  const Arguments arguments("batch_norm_act", "x", x);
  Tensor z = empty_beside(x);
  apply(arguments, x, affine, residual, residual_affine, relu, residual_channel, z);
  return z;
}

void batch_norm_act_(const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
                     const OptionalTensor& residual_affine, bool relu) {
  apply({"batch_norm_act_", "x", x}, x, affine, residual, residual_affine, relu, 0, x);
}

Tensor batch_norm_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& moments, const Tensor& affine,
                             const OptionalTensor& z, const OptionalTensor& residual,
                             const OptionalTensor& residual_moments, bool relu) {
  const Arguments arguments("batch_norm_act_reduce", "x", x);
  check_reduce(arguments, grad, moments, affine, z, residual, residual_moments);

  const Device device(arguments);
  const cuda::Matrix matrix = matrix_of(arguments);
  const int vector = cuda::vector_width(
      matrix, {data(grad), data(x), data(moments), data(affine), data(z), data(residual), data(residual_moments)});
  const cuda::Plan plan = cuda::reduction_plan(matrix, vector, device.launch().multiprocessors);
  const bool two = residual.has_value();
  Tensor partial = empty_partial(arguments, plan, two ? 3 : 2, ScalarType::Float);  // ΣG is the same for both branches
  Tensor sums = empty_rows(arguments, two ? 4 : 2);
  device.check(cuda::batch_norm_act_reduce(device.launch(), {
                                                                plan,
                                                                matrix.dtype,
                                                                masked_gradient(grad, z, affine, relu),
                                                                data(x),
                                                                floats(moments),
                                                                data(residual),
                                                                floats(residual_moments),
                                                                mutable_floats(partial),
                                                                mutable_floats(sums),
                                                            }));
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_coefficients(const Tensor& sums, int64_t branch, const Tensor& moments,
                                                           const OptionalTensor& weight, double eps, int64_t count,
                                                           bool batch_stats) {
  const ChannelArguments arguments("batch_norm_coefficients", moments);
  check_sums(arguments, sums, branch);
  const cuda::Parameter weights = parameter(arguments, "weight", weight);
  const Device device(arguments);
  const int64_t channels = arguments.channels();
  Tensor grad_weight = empty_channels(arguments), grad_bias = empty_channels(arguments);
  Tensor coefficients = empty_rows(arguments, batch_stats ? 4 : 1);
  device.check(cuda::batch_norm_coefficients(device.launch(), {
                                                                  channels,
                                                                  floats(sums) + 2 * branch * channels,
                                                                  floats(moments),
                                                                  weights,
                                                                  eps,
                                                                  count,
                                                                  batch_stats,
                                                                  mutable_floats(grad_weight),
                                                                  mutable_floats(grad_bias),
                                                                  mutable_floats(coefficients),
                                                              }));
  return {grad_weight, grad_bias, coefficients};
}

std::tuple<Tensor, Tensor> batch_norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& affine,
                                                   const Tensor& coefficients, const OptionalTensor& z,
                                                   const OptionalTensor& residual,
                                                   const OptionalTensor& residual_coefficients, bool relu,
                                                   int64_t masked_channels, int64_t masked_channel) {
  const Arguments arguments("batch_norm_act_backward", "x", x);
  check_backward(arguments, grad, affine, coefficients, z, residual, residual_coefficients, masked_channels,
                 masked_channel);

  const Device device(arguments);
  const bool two = residual.has_value();
  const bool write_masked = masked_channels != 0 && !two;
  Tensor dx = empty_beside(x), second = two            ? empty_beside(grad)
                                        : write_masked ? empty_part(arguments, grad, masked_channels)
                                                       : nothing(grad);
  void* second_data = second.mutable_data_ptr();
  device.check(cuda::batch_norm_act_backward(device.launch(), {
                                                                  matrix_of(arguments),
                                                                  masked_gradient(grad, z, affine, relu),
                                                                  data(x),
                                                                  coefficients_of(coefficients),
                                                                  dx.mutable_data_ptr(),
                                                                  write_masked ? second_data : nullptr,
                                                                  data(residual),
                                                                  coefficients_of(residual_coefficients),
                                                                  two ? second_data : nullptr,
                                                                  {masked_channel, masked_channels},
                                                                  nullptr,
                                                              }));
  return {dx, second};
}

// The gradient's memory becomes that of dx: one tensor less to allocate.  The activation costs its own writes alone,
// since x is being read.
Tensor batch_norm_act_backward_(const Tensor& grad, const Tensor& x, const Tensor& affine, const Tensor& coefficients,
                                const OptionalTensor& z, bool relu, bool wants_activation) {
  const Arguments arguments("batch_norm_act_backward_", "x", x);
  check_backward_in_place(arguments, grad, affine, coefficients, z, wants_activation);
  const Device device(arguments);
  Tensor activation = wants_activation ? empty_beside(x) : nothing(x);
  device.check(
      cuda::batch_norm_act_backward(device.launch(), {
                                                         matrix_of(arguments),
                                                         masked_gradient(grad, z, affine, relu),
                                                         data(x),
                                                         coefficients_of(coefficients),
                                                         grad.mutable_data_ptr(),
                                                         nullptr,
                                                         nullptr,
                                                         {},
                                                         nullptr,
                                                         {},
                                                         wants_activation ? activation.mutable_data_ptr() : nullptr,
                                                     }));
  return activation;
}

// G of masked_grad into `out`, which is grad itself or a tensor beside it; returns its sums.
Tensor mask(const Arguments& arguments, const Tensor& grad, const OptionalTensor& other, const Tensor& z,
            const Tensor& out) {
  check_masked_grad(arguments, other, z);
  const Device device(arguments);
  const cuda::Matrix matrix = matrix_of(arguments);
  Tensor sum_grad = empty_channels(arguments);
  const int vector = cuda::vector_width(matrix, {data(grad), data(other), data(z), data(out)});
  const cuda::Plan plan = cuda::reduction_plan(matrix, vector, device.launch().multiprocessors);
  Tensor partial = empty_partial(arguments, plan, 1, ScalarType::Float);
  device.check(cuda::masked_grad(device.launch(), {
                                                      plan,
                                                      matrix.dtype,
                                                      data(grad),
                                                      data(other),
                                                      data(z),
                                                      out.mutable_data_ptr(),
                                                      mutable_floats(partial),
                                                      mutable_floats(sum_grad),
                                                  }));
  return sum_grad;
}

std::tuple<Tensor, Tensor> masked_grad(const Tensor& grad, const Tensor& z) {
  const Arguments arguments("masked_grad", "grad", grad);
  Tensor masked = empty_beside(grad);
  return {masked, mask(arguments, grad, std::nullopt, z, masked)};
}

Tensor masked_grad_(const Tensor& grad, const OptionalTensor& other, const Tensor& z) {
  return mask({"masked_grad_", "grad", grad}, grad, other, z, grad);
}

void add_masked_(const Tensor& dx, const Tensor& grad, const OptionalTensor& z, bool relu) {
  const Arguments arguments("add_masked_", "dx", dx);
  check_add_masked(arguments, grad, z, relu);
  const Device device(arguments);
  device.check(cuda::add_masked(device.launch(),
                                {matrix_of(arguments), data(grad), relu ? data(z) : nullptr, dx.mutable_data_ptr()}));
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CUDA, m) {
  m.impl("batch_norm_stats", TORCH_BOX(&fused_resnet::batch_norm_stats));
  m.impl("batch_norm_affine", TORCH_BOX(&fused_resnet::batch_norm_affine));
  m.impl("batch_norm_act", TORCH_BOX(&fused_resnet::batch_norm_act));
  m.impl("batch_norm_act_", TORCH_BOX(&fused_resnet::batch_norm_act_));
  m.impl("batch_norm_act_reduce", TORCH_BOX(&fused_resnet::batch_norm_act_reduce));
  m.impl("batch_norm_coefficients", TORCH_BOX(&fused_resnet::batch_norm_coefficients));
  m.impl("batch_norm_act_backward", TORCH_BOX(&fused_resnet::batch_norm_act_backward));
  m.impl("batch_norm_act_backward_", TORCH_BOX(&fused_resnet::batch_norm_act_backward_));
  m.impl("masked_grad", TORCH_BOX(&fused_resnet::masked_grad));
  m.impl("masked_grad_", TORCH_BOX(&fused_resnet::masked_grad_));
  m.impl("add_masked_", TORCH_BOX(&fused_resnet::add_masked_));
}
