// What the engines' operations share: checks of their arguments, and allocation of what they return.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fused_resnet/types.h"

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// ---- checks: an error names the operation, the argument, what was wanted and what came

inline std::string to_string(const int64_t* values, size_t count) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < count; ++i) out << (i != 0 ? ", " : "") << values[i];
  out << ']';
  return out.str();
}
inline std::string to_string(const Sizes& sizes) { return to_string(sizes.data(), sizes.size()); }

inline Sizes sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline int64_t itemsize(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::BFloat16 ? 2 : 4;
}

inline std::string describe_strides(const Tensor& t) {
  return "shape " + to_string(sizes_of(t)) + " with strides " + to_string(t.strides().data(), t.strides().size());
}

// What the arguments of one call have in common where they are per-channel tensors only.
class ChannelArguments {
 public:
  // `moments` [3, C] says how many channels there are, and their dtype.
  ChannelArguments(const char* op, const Tensor& moments)
      : op_(op), anchor_(moments), accumulator_(moments.scalar_type()) {
    if (moments.dim() != 2) fail("moments", "two dimensions [3, C]", std::to_string(moments.dim()) + " dimensions");
    if (accumulator_ != ScalarType::Float && accumulator_ != ScalarType::Double) {
      fail("moments", "dtype float32 or float64", torch::headeronly::toString(accumulator_));
    }
    channels_ = moments.size(1);
    check_channels("moments", moments, 3);
  }

  [[noreturn]] void fail(const std::string& name, const std::string& wanted, const std::string& got) const {
    throw std::runtime_error(std::string("fused_resnet::") + op_ + ": " + name + " must have " + wanted + ", got " +
                             got);
  }

  // A [rows, C] tensor of accumulators.
  void check_channels(const char* name, const Tensor& t, int64_t rows) const {
    const Sizes wanted = {rows, channels_};
    if (sizes_of(t) != wanted) fail(name, "shape " + to_string(wanted), to_string(sizes_of(t)));
    if (t.scalar_type() != accumulator_) {
      fail(name, std::string("dtype ") + torch::headeronly::toString(accumulator_),
           torch::headeronly::toString(t.scalar_type()));
    }
    if (!t.is_contiguous()) fail(name, "contiguous strides", describe_strides(t));
  }

  const Tensor& anchor() const { return anchor_; }  // the tensor that the others are checked against
  int64_t channels() const { return channels_; }
  ScalarType accumulator() const { return accumulator_; }

 protected:
  // For a subclass that reads channels_ and accumulator_ off another anchor.
  ChannelArguments(const char* op, const Tensor& anchor, std::nullopt_t) : op_(op), anchor_(anchor) {}

  const char* op_;
  const Tensor& anchor_;
  int64_t channels_ = 0;
  ScalarType accumulator_ = ScalarType::Float;
};

// The same where there are activations: all have the shape, dtype and memory format of the first.
class Arguments : public ChannelArguments {
 public:
  Arguments(const char* op, const char* name, const Tensor& x) : ChannelArguments(op, x, std::nullopt), name_(name) {
    if (x.dim() != 4) fail(name, "four dimensions [N, C, H, W]", std::to_string(x.dim()) + " dimensions");
    const ScalarType dtype = x.scalar_type();
    if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Double) {
      fail(name, "dtype float32, bfloat16 or float64", torch::headeronly::toString(dtype));
    }
    channels_ = x.size(1);
    accumulator_ = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    channels_last_ = is_channels_last(x);
    if (!channels_last_ && !x.is_contiguous()) {
      fail(name, "dense strides, contiguous or channels_last", describe_strides(x) + "; call .contiguous() first");
    }
  }

  // Another activation, element for element beside the first.
  void check_like(const char* name, const Tensor& t) const { check_like(name, t, anchor_.scalar_type()); }
  void check_like(const char* name, const Tensor& t, ScalarType dtype) const {
    if (sizes_of(t) != sizes()) {
      fail(name, std::string("the shape of ") + name_ + ", " + to_string(sizes()), to_string(sizes_of(t)));
    }
    if (t.scalar_type() != dtype) {
      fail(name, std::string("dtype ") + torch::headeronly::toString(dtype),
           torch::headeronly::toString(t.scalar_type()));
    }
    if (!(channels_last_ ? is_channels_last(t) : t.is_contiguous())) {
      fail(name, std::string("the memory format of ") + name_ + (channels_last_ ? ", channels_last" : ", contiguous"),
           describe_strides(t));
    }
  }

  // A per-channel tensor that has to be there exactly where `partner` is.
  void check_partner(const char* name, const OptionalTensor& t, int64_t rows, const char* partner,
                     const OptionalTensor& other) const {
    if (t.has_value() != other.has_value()) {
      fail(name, std::string(other.has_value() ? "a value" : "no value") + ", as " + partner + " has",
           t.has_value() ? "a tensor" : "None");
    }
    if (t.has_value()) check_channels(name, *t, rows);
  }

  Sizes sizes() const { return sizes_of(anchor_); }
  bool channels_last() const { return channels_last_; }
  DType dtype() const {
    const ScalarType dtype = anchor_.scalar_type();
    return dtype == ScalarType::Double     ? DType::kFloat64
           : dtype == ScalarType::BFloat16 ? DType::kBFloat16
                                           : DType::kFloat32;
  }

 private:
  // Dense in the order N, H, W, C; the stride of a dimension of one element says nothing.
  static bool is_channels_last(const Tensor& t) {
    int64_t expected = 1;
    for (int64_t dim : {1, 3, 2, 0}) {
      if (t.size(dim) != 1 && t.stride(dim) != expected && t.numel() != 0) return false;
      expected *= t.size(dim);
    }
    return true;
  }

  const char* name_;
  bool channels_last_;
};

// ---- allocation

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

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

// ---- per-channel parameters

// visitor(values), typed, of a [C] vector of any floating dtype: a parameter or a running statistic.
template <typename Visitor>
void visit_parameter(const ChannelArguments& arguments, const char* name, const Tensor& t, const Visitor& visitor) {
  const Sizes wanted = {arguments.channels()};
  if (sizes_of(t) != wanted) arguments.fail(name, "shape " + to_string(wanted), to_string(sizes_of(t)));
  void* values = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return visitor(static_cast<float*>(values));
    case ScalarType::Double:
      return visitor(static_cast<double*>(values));
    case ScalarType::BFloat16:
      return visitor(static_cast<torch::headeronly::BFloat16*>(values));
    case ScalarType::Half:
      return visitor(static_cast<torch::headeronly::Half*>(values));
    default:
      arguments.fail(name, "a floating dtype", torch::headeronly::toString(t.scalar_type()));
  }
}

// A parameter, if it is given, in double.
class Parameter {
 public:
  Parameter(const ChannelArguments& arguments, const char* name, const OptionalTensor& t) : given_(t.has_value()) {
    if (!given_) return;
    visit_parameter(arguments, name, *t, [&](const auto* values) {
      values_.resize(static_cast<size_t>(arguments.channels()));
      for (size_t c = 0; c < values_.size(); ++c) {
        values_[c] = static_cast<double>(values[static_cast<int64_t>(c) * t->stride(0)]);
      }
    });
  }

  const double* get() const { return given_ ? values_.data() : nullptr; }

 private:
  bool given_;
  std::vector<double> values_;
};

}  // namespace fused_resnet
