// What the engines' operations share: checks of their arguments, and allocation of what they return.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "types.h"

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// What the kernels of this library take; every ops_<engine>.cpp says it of its own.
struct Engine {
  int32_t device_type;  // as aoti_torch_device_type_cpu() numbers them
  std::vector<ScalarType> dtypes;
  bool contiguous;  // the memory format, beside channels_last
};
extern const Engine kEngine;

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
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

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

inline bool contains(const std::vector<ScalarType>& dtypes, ScalarType dtype) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

// The kernels' name of a floating dtype.
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

  // A [rows, C] tensor of accumulators.
  void check_channels(const char* name, const Tensor& t, int64_t rows) const {
    const Sizes wanted = {rows, channels_};
    if (sizes_of(t) != wanted) fail(name, "shape " + to_string(wanted), to_string(sizes_of(t)));
    if (t.scalar_type() != accumulator_) {
      fail(name, std::string("dtype ") + torch::headeronly::toString(accumulator_),
           torch::headeronly::toString(t.scalar_type()));
    }
    if (!t.is_contiguous()) fail(name, "contiguous strides", describe_strides(t));
    check_device(name, t);
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
    if (t.scalar_type() != dtype) {
      fail(name, std::string("dtype ") + torch::headeronly::toString(dtype),
           torch::headeronly::toString(t.scalar_type()));
    }
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

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

// ---- per-channel parameters

// A [C] vector of any floating dtype: a parameter or a running statistic.
inline void check_parameter(const ChannelArguments& arguments, const char* name, const Tensor& t) {
  const Sizes wanted = {arguments.channels()};
  if (sizes_of(t) != wanted) arguments.fail(name, "shape " + to_string(wanted), to_string(sizes_of(t)));
  if (!contains({ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}, t.scalar_type())) {
    arguments.fail(name, "a floating dtype", torch::headeronly::toString(t.scalar_type()));
  }
  arguments.check_device(name, t);
}

}  // namespace fused_resnet
