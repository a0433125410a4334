// Per-channel tensors in C++'s types.
#pragma once

#include <vector>

#include "ops/arguments.h"

namespace fused_resnet {

// visitor(A{}) with the C++ type of the accumulators.
template <typename Visitor>
void visit_accumulator(ScalarType dtype, const Visitor& visitor) {
  dtype == ScalarType::Double ? visitor(double{}) : visitor(float{});
}

// visitor(values), typed, of a parameter or a running statistic.
template <typename Visitor>
void visit_parameter(const Tensor& t, const Visitor& visitor) {
  void* values = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return visitor(static_cast<double*>(values));
    case ScalarType::BFloat16:
      return visitor(static_cast<torch::headeronly::BFloat16*>(values));
    case ScalarType::Half:
      return visitor(static_cast<torch::headeronly::Half*>(values));
    default:
      return visitor(static_cast<float*>(values));
  }
}

// A parameter, if it is given, in double.
class Parameter {
 public:
  explicit Parameter(const OptionalTensor& t) : given_(t.has_value()) {
    if (!given_) return;
    visit_parameter(*t, [&](const auto* values) {
      values_.resize(static_cast<size_t>(t->size(0)));
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
