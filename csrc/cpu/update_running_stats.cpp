// Running statistics, for which only the CPU engine has an operation of its own.
#include <torch/csrc/stable/library.h>

#include "channel_values.h"
#include "ops/arguments.h"

namespace fused_resnet::cpu {
namespace {

// running += momentum·(batch − running), as torch.nn.BatchNorm2d moves its statistics.
template <typename R, typename A>
void move_running(R* running, int64_t stride, const A* batch, double momentum, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c, running += stride) {
    const double now = static_cast<double>(*running);
    *running = static_cast<R>(now + momentum * (static_cast<double>(batch[c]) - now));
  }
}

// Lists of one length, before anything is written.
void check_running_stats(const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                         const std::vector<Tensor>& counters, const std::vector<Tensor>& moments, bool has_momentum) {
  if (moments.empty()) return;
  const ChannelArguments arguments("update_running_stats_", moments[0]);
  const auto check_length = [&](const char* name, size_t length) {
    if (length == moments.size()) return;
    arguments.fail(name, std::to_string(moments.size()) + " tensors, as moments has", std::to_string(length));
  };
  check_length("means", means.size());
  check_length("variances", variances.size());
  if (!has_momentum) check_length("counters", counters.size());
  for (const Tensor& counter : counters) {
    if (counter.scalar_type() == ScalarType::Long) continue;
    arguments.fail("counters", "dtype int64 (num_batches_tracked.long())",
                   torch::headeronly::toString(counter.scalar_type()));
  }
}

void update_running_stats_(const std::vector<Tensor>& means, const std::vector<Tensor>& variances,
                           const std::vector<Tensor>& counters, const std::vector<Tensor>& moments,
                           std::optional<double> momentum) {
  check_running_stats(means, variances, counters, moments, momentum.has_value());
  for (const Tensor& counter : counters) ++*static_cast<int64_t*>(counter.mutable_data_ptr());
  for (size_t i = 0; i < moments.size(); ++i) {
    const ChannelArguments arguments("update_running_stats_", moments[i]);
    const int64_t channels = arguments.channels();
    // a cumulative average where there is no momentum
    const double weight =
        momentum.has_value() ? *momentum : 1 / static_cast<double>(*static_cast<const int64_t*>(data(counters[i])));
    visit_accumulator(dtype_of(arguments.accumulator()), [&](auto accumulator) {
      const auto* batch = static_cast<const decltype(accumulator)*>(data(moments[i]));
      const auto move = [&](const char* name, const Tensor& running, const auto* values) {
        arguments.check_parameter(name, running);
        visit_parameter(dtype_of(running.scalar_type()), [&](auto element) {
          auto* target = static_cast<decltype(element)*>(running.mutable_data_ptr());
          move_running(target, running.stride(0), values, weight, channels);
        });
      };
      move("means", means[i], batch);
      move("variances", variances[i], batch + 2 * channels);
    });
  }
}

}  // namespace
}  // namespace fused_resnet::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("update_running_stats_", TORCH_BOX(&fused_resnet::cpu::update_running_stats_));
}
