// Per-channel values in C++'s types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "ops/engine.h"

namespace fused_resnet::cpu {

// visitor(A{}) with the type that the kernels accumulate elements of a dtype in.
template <typename Visitor>
void visit_accumulator(DType dtype, const Visitor& visitor) {
  dtype == DType::kFloat64 ? visitor(double{}) : visitor(float{});
}

inline int64_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

// visitor(T{}) with the type of a parameter or a running statistic.
template <typename Visitor>
void visit_parameter(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::kFloat64:
      return visitor(double{});
    case DType::kBFloat16:
      return visitor(torch::headeronly::BFloat16{});
    case DType::kFloat16:
      return visitor(torch::headeronly::Half{});
    case DType::kFloat32:
      return visitor(float{});
  }
}

// A parameter, if it is given, in double.
class ParameterValues {
 public:
  ParameterValues(const Parameter& parameter, int64_t channels) : given_(parameter.values != nullptr) {
    if (!given_) return;
    values_.reserve(static_cast<size_t>(channels));
    visit_parameter(parameter.dtype, [&](auto element) {
      const auto* values = static_cast<const decltype(element)*>(parameter.values);
      for (int64_t c = 0; c < channels; ++c) values_.push_back(static_cast<double>(values[c * parameter.stride]));
    });
  }

  const double* get() const { return given_ ? values_.data() : nullptr; }

 private:
  bool given_;
  std::vector<double> values_;
};

}  // namespace fused_resnet::cpu
