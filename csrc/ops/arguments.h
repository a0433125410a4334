// Checks of the operations' arguments.  An error names the operation, the argument, what was wanted and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// What the kernels of this library take.
struct Engine {
  int32_t device_type;  // as aoti_torch_device_type_cpu() numbers them
  std::vector<ScalarType> dtypes;
  bool contiguous;  // the memory format, beside channels_last
};
extern const Engine kEngine;

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

inline Sizes sizes_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// The engines' name of a floating dtype.
inline DType dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

// ---- how a message shows what came

inline std::string to_string(const int64_t* values, size_t count) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < count; ++i) out << (i != 0 ? ", " : "") << values[i];
  out << ']';
  return out.str();
}
inline std::string to_string(const Sizes& sizes) { return to_string(sizes.data(), sizes.size()); }

// As Python names it.
inline std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// "float32, bfloat16 or float64"
inline std::string to_string(const std::vector<ScalarType>& dtypes) {
  std::string out;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    out += (i == 0 ? "" : i + 1 == dtypes.size() ? " or " : ", ") + to_string(dtypes[i]);
  }
  return out;
}

inline int32_t device_type(const Tensor& t) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

inline std::string describe_device(const Tensor& t) {
  const int32_t index = t.get_device_index();
  return (device_type(t) == aoti_torch_device_type_cpu()    ? "cpu"
          : device_type(t) == aoti_torch_device_type_cuda() ? "cuda"
                                                            : "another") +
         (index < 0 ? std::string() : ":" + std::to_string(index));
}

inline std::string describe_strides(const Tensor& t) {
  return "shape " + to_string(sizes_of(t)) + " with strides " + to_string(t.strides().data(), t.strides().size());
}

inline bool contains(const std::vector<ScalarType>& dtypes, ScalarType dtype) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

// ---- the checks

// What the arguments of one call have in common where they are per-channel tensors only.
class ChannelArguments {
 public:
  // `moments` [3, C] says how many channels there are, and their dtype.
  ChannelArguments(const char* op, const Tensor& moments)
      : op_(op), anchor_(moments), accumulator_(moments.scalar_type()) {
    if (moments.dim() != 2) fail("moments", "two dimensions [3, C]", std::to_string(moments.dim()) + " dimensions");
    const std::vector<ScalarType> accumulators = contains(kEngine.dtypes, ScalarType::Double)
                                                     ? std::vector<ScalarType>{ScalarType::Float, ScalarType::Double}
                                                     : std::vector<ScalarType>{ScalarType::Float};
    if (!contains(accumulators, accumulator_)) {
      fail("moments", "dtype " + to_string(accumulators), torch::headeronly::toString(accumulator_));
    }
    check_engine("moments");
    channels_ = moments.size(1);
    check_channels("moments", moments, 3);
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(std::string("fused_resnet::") + op_ + ": " + what);
  }
  [[noreturn]] void fail(const std::string& name, const std::string& wanted, const std::string& got) const {
    fail(name + " must have " + wanted + ", got " + got);
  }

  // Kernels take addresses: a tensor elsewhere would be read as if it were here.
  void check_device(const char* name, const Tensor& t) const {
    if (device_type(t) != device_type(anchor_) || t.get_device_index() != anchor_.get_device_index()) {
      fail(name, "device " + describe_device(anchor_), describe_device(t));
    }
  }

  void check_dtype(const char* name, const Tensor& t, ScalarType dtype) const {
    if (t.scalar_type() == dtype) return;
    fail(name, std::string("dtype ") + torch::headeronly::toString(dtype),
         torch::headeronly::toString(t.scalar_type()));
  }

  // A [rows, C] tensor of accumulators.
  void check_channels(const char* name, const Tensor& t, int64_t rows) const {
    const Sizes wanted = {rows, channels_};
    if (sizes_of(t) != wanted) fail(name, "shape " + to_string(wanted), to_string(sizes_of(t)));
    check_dtype(name, t, accumulator_);
    if (!t.is_contiguous()) fail(name, "contiguous strides", describe_strides(t));
    check_device(name, t);
  }

  // A [C] vector of any floating dtype: a parameter or a running statistic.
  void check_parameter(const char* name, const Tensor& t) const {
    const Sizes wanted = {channels_};
    if (sizes_of(t) != wanted) fail(name, "shape " + to_string(wanted), to_string(sizes_of(t)));
    if (!contains({ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}, t.scalar_type())) {
      fail(name, "a floating dtype", torch::headeronly::toString(t.scalar_type()));
    }
    check_device(name, t);
  }

  // The same, if it is given, checked and as the engines see it.
  Parameter parameter(const char* name, const OptionalTensor& t) const {
    if (!t.has_value()) return {nullptr, DType::kFloat32, 0};
    check_parameter(name, *t);
    return {data(t), dtype_of(t->scalar_type()), t->stride(0)};
  }

  const Tensor& anchor() const { return anchor_; }  // the tensor that the others are checked against
  int64_t channels() const { return channels_; }
  ScalarType accumulator() const { return accumulator_; }

 protected:
  // For a subclass that reads channels_ and accumulator_ off another anchor.
  ChannelArguments(const char* op, const Tensor& anchor, std::nullopt_t) : op_(op), anchor_(anchor) {}

  // torch dispatches on any of the arguments, the anchor is the one that decides where the kernels run.
  void check_engine(const char* name) const {
    if (device_type(anchor_) != kEngine.device_type) {
      fail(name, "the device of the other tensors", describe_device(anchor_));
    }
  }

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
    if (!contains(kEngine.dtypes, dtype)) {
      fail(name, "dtype " + to_string(kEngine.dtypes), torch::headeronly::toString(dtype));
    }
    check_engine(name);
    channels_ = x.size(1);
    accumulator_ = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    channels_last_ = is_channels_last(x);
    if (!channels_last_ && !kEngine.contiguous) {
      fail(name, "channels_last strides",
           describe_strides(x) + "; call .contiguous(memory_format=torch.channels_last) first");
    }
    if (!channels_last_ && !x.is_contiguous()) {
      fail(name, "dense strides, contiguous or channels_last", describe_strides(x) + "; call .contiguous() first");
    }
  }

  // Another activation, element for element beside the first.
  void check_like(const char* name, const Tensor& t) const { check_like(name, t, anchor_.scalar_type()); }
  void check_like(const char* name, const Tensor& t, ScalarType dtype) const { check_like(name, t, dtype, sizes()); }
  void check_like(const char* name, const Tensor& t, ScalarType dtype, const Sizes& wanted) const {
    if (sizes_of(t) != wanted) {
      const char* part = wanted == sizes() ? ", " : " with fewer channels, ";
      fail(name, std::string("the shape of ") + name_ + part + to_string(wanted), to_string(sizes_of(t)));
    }
    check_dtype(name, t, dtype);
    if (!(channels_last_ ? is_channels_last(t) : t.is_contiguous())) {
      fail(name, std::string("the memory format of ") + name_ + (channels_last_ ? ", channels_last" : ", contiguous"),
           describe_strides(t));
    }
    check_device(name, t);
  }

  // One that may have fewer channels, the first of which is channel `first` of the arguments.
  void check_part(const char* name, const Tensor& t, const char* first_name, int64_t first) const {
    Sizes wanted = sizes();
    if (t.dim() == 4 && t.size(1) != 0) wanted[1] = std::min(wanted[1], t.size(1));
    check_like(name, t, anchor_.scalar_type(), wanted);
    check_value(first_name, first, channels_ - wanted[1]);
  }

  void check_value(const char* name, int64_t value, int64_t most) const {
    if (value < 0 || value > most) fail(name, "a value from 0 to " + std::to_string(most), std::to_string(value));
  }

  // An activation, of its number and its constants.
  Act act(int64_t kind, double alpha, double beta) const {
    check_value("act", kind, static_cast<int64_t>(ActKind::kGeluTanh));
    return {static_cast<ActKind>(kind), alpha, beta};
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
  DType dtype() const { return dtype_of(anchor_.scalar_type()); }
  Image image() const {
    const int64_t plane = anchor_.size(2) * anchor_.size(3);
    return {dtype(), channels_last_, anchor_.size(0) * plane, channels_, plane};
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

}  // namespace fused_resnet
