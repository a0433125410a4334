// The CPU engine of the operations that fused_resnet/ops defines: layouts, threads, registration.
//
// Written against torch's stable ABI, so that one library serves every torch from the version that it is built for.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <tuple>

#include "arguments.h"
#include "batch_norm_act_arguments.h"
#include "cpu/channel_math.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"

namespace fused_resnet {

const Engine kEngine = {
    aoti_torch_device_type_cpu(), {ScalarType::Float, ScalarType::BFloat16, ScalarType::Double}, true};

namespace {

// Work of fewer elements than this stays on one thread.
constexpr int64_t kGrainElements = 32 << 10;

// An output from this size on is stored past the caches: what reads it next would not find it there anyway, and the
// caches keep what they hold.
constexpr int64_t kStreamBytes = 16 << 20;
constexpr int64_t kStreamAlignment = 64;

// ---- layouts

// How the kernels see the arguments' activations.
struct Layout {
  explicit Layout(const Arguments& arguments) {
    const Sizes s = arguments.sizes();
    const int64_t pixels = s[0] * s[2] * s[3];
    activation.dtype = arguments.dtype();
    activation.planes = !arguments.channels_last();
    activation.numel = pixels * s[1];
    activation.channels = s[1];
    if (activation.planes) {
      activation.length = s[2] * s[3];
    } else {
      plan = fused_resnet::plan(pixels, s[1], itemsize(arguments.anchor().scalar_type()));
      activation.length = plan.row_length;
    }
  }

  // Whether an output is worth storing past the caches, and may be.
  bool streams(std::initializer_list<const void*> outputs, ScalarType dtype) const {
    const int64_t size = itemsize(dtype);
    if (activation.numel * size < kStreamBytes || activation.length * size % kStreamAlignment != 0) return false;
    return std::all_of(outputs.begin(), outputs.end(),
                       [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kStreamAlignment == 0; });
  }

  Activation activation;
  Plan plan{};  // channels_last only
};

// The rows of a [rows, C] tensor, each repeated as often as a row of the activation has pixels.
class ChannelRows {
 public:
  ChannelRows(const OptionalTensor& t, const Layout& layout) {
    if (!t.has_value()) return;
    const int64_t channels = layout.activation.channels;
    const int64_t repeat = layout.activation.planes ? 1 : std::max<int64_t>(layout.plan.repeat, 1);
    const size_t row_bytes = static_cast<size_t>(channels * itemsize(t->scalar_type()));
    pitch_ = row_bytes * static_cast<size_t>(repeat);
    rows_ = t->size(0);
    values_ = static_cast<const char*>(t->const_data_ptr());
    if (repeat == 1) return;
    repeated_ = std::make_unique<char[]>(pitch_ * static_cast<size_t>(rows_));
    char* out = repeated_.get();
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t i = 0; i < repeat; ++i, out += row_bytes) {
        std::memcpy(out, values_ + static_cast<size_t>(row) * row_bytes, row_bytes);
      }
    }
    values_ = repeated_.get();
  }

  // Null where there is no such row.
  const void* operator[](int64_t row) const {
    return row < rows_ ? values_ + static_cast<size_t>(row) * pitch_ : nullptr;
  }

 private:
  const char* values_ = nullptr;
  int64_t rows_ = 0;
  size_t pitch_ = 0;
  std::unique_ptr<char[]> repeated_;
};

template <typename F>
void parallel_for_rows(const Activation& activation, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, activation.length));
  torch::stable::parallel_for(0, activation.rows(), grain, [&](int64_t begin, int64_t end) { f(Range{begin, end}); });
}

// f(part, tile) over the tiles of a reduction; part numbers the row tiles that have to be merged.
int64_t reduction_parts(const Layout& layout) { return layout.activation.planes ? 1 : layout.plan.row_tiles; }

template <typename F>
void parallel_for_tiles(const Layout& layout, const F& f) {
  const Activation& activation = layout.activation;
  if (activation.numel == 0) return;
  if (activation.planes) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (activation.numel / activation.channels));
    torch::stable::parallel_for(0, activation.channels, grain,
                                [&](int64_t begin, int64_t end) { f(0, Tile{{0, 0}, {begin, end}}); });
    return;
  }
  const Plan& plan = layout.plan;
  torch::stable::parallel_for(0, plan.tiles(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / plan.column_tiles, row = part * plan.row_tile;
      const int64_t column = i % plan.column_tiles * plan.column_tile;
      f(part, Tile{{row, std::min(row + plan.row_tile, activation.rows())},
                   {column, std::min(column + plan.column_tile, plan.row_length)}});
    }
  });
}

// ---- tensors that have a part of the channels

// Elements of the rows that are laid out at a time: a small part of the L1 cache, so that the loads of one strip are
// under way while the arithmetic of the one before is done.
constexpr int64_t kStripElements = 1 << 10;

struct alignas(64) CacheLine {
  char bytes[64];
};

char* shifted(const void* p, int64_t bytes) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes));
}

// A few moves where it can be: a call of memcpy would cost more.
void copy_pixel(char* to, const char* from, int64_t bytes) {
  if (bytes % 16 != 0) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i < bytes; i += 16) std::memcpy(to + i, from + i, 16);
}

// visitor(rows, beside) over strips of the rows: `beside` is where a kernel that works on them finds the tensor as if
// it had all channels, or null where it has none of them.  Contiguous, a row is a plane, which the tensor has or lacks.
// channels_last, its pixels are copied into (kWrites: out of) a strip that is 0 in the channels that it lacks.
template <bool kWrites, typename Visitor>
void for_each_strip(const Layout& layout, ChannelPart part, int64_t size, const void* tensor, Range rows,
                    const Visitor& visitor) {
  const Activation& activation = layout.activation;
  const int64_t channels = activation.channels, row_bytes = activation.length * size;
  if (activation.planes) {
    for (int64_t row = rows.begin, end; row < rows.end; row = end) {
      const int64_t image = row / channels, channel = row % channels, last = part.first + part.count;
      const bool has = channel >= part.first && channel < last;
      end = std::min(rows.end, image * channels + (has ? last : channel < part.first ? part.first : channels));
      const int64_t plane = image * part.count + channel - part.first;
      visitor(Range{row, end}, has ? shifted(tensor, (plane - row) * row_bytes) : nullptr);
    }
    return;
  }
  const int64_t step = std::max<int64_t>(1, kStripElements / activation.length);
  std::vector<CacheLine> strip(static_cast<size_t>(step * row_bytes) / sizeof(CacheLine) + 1);
  for (int64_t row = rows.begin; row < rows.end; row += step) {
    const Range chunk = {row, std::min(row + step, rows.end)};
    const auto copy = [&] {
      const int64_t part_bytes = part.count * size;
      char* pixel = strip.front().bytes + part.first * size;
      char* own = shifted(tensor, row * layout.plan.repeat * part_bytes);
      for (int64_t left = activation.pixels(chunk); left > 0; --left, pixel += channels * size, own += part_bytes) {
        kWrites ? copy_pixel(own, pixel, part_bytes) : copy_pixel(pixel, own, part_bytes);
      }
    };
    if (!kWrites) copy();
    visitor(chunk, shifted(strip.data(), -row * row_bytes));
    if (kWrites) copy();
  }
}

// visitor(A{}) with the C++ type of the accumulators.
template <typename Visitor>
void visit_accumulator(ScalarType dtype, const Visitor& visitor) {
  dtype == ScalarType::Double ? visitor(double{}) : visitor(float{});
}

// ---- per-channel parameters

// visitor(values), typed, of a parameter or a running statistic.
template <typename Visitor>
void visit_parameter(const ChannelArguments& arguments, const char* name, const Tensor& t, const Visitor& visitor) {
  check_parameter(arguments, name, t);
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

// ---- the operations

// affine [2, C] from moments [3, C].
Tensor affine_of(const ChannelArguments& arguments, const Tensor& moments, const Parameter& weight,
                 const Parameter& bias, double eps) {
  const int64_t channels = arguments.channels();
  Tensor affine = empty_rows(arguments, 2);
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    using A = decltype(accumulator);
    const A* mean = static_cast<const A*>(data(moments));
    A* scale = static_cast<A*>(affine.mutable_data_ptr());
    finish_affine(mean, mean + channels, weight.get(), bias.get(), eps, channels, scale, scale + channels);
  });
  return affine;
}

Tensor batch_norm_affine(const Tensor& moments, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const ChannelArguments arguments("batch_norm_affine", moments);
  return affine_of(arguments, moments, {arguments, "weight", weight}, {arguments, "bias", bias}, eps);
}

std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                            double eps) {
  const Arguments arguments("batch_norm_stats", "x", x);
  const Parameter weights(arguments, "weight", weight), biases(arguments, "bias", bias);
  const Layout layout(arguments);
  const int64_t channels = arguments.channels(), parts = reduction_parts(layout);
  const size_t size = static_cast<size_t>(std::max<int64_t>(parts, 1) * channels);
  const std::unique_ptr<double[]> means(new double[size]), m2s(new double[size]);
  parallel_for_tiles(layout, [&](int64_t part, Tile tile) {
    const int64_t offset = part * channels;
    kernels().batch_norm_stats({layout.activation, data(x), means.get() + offset, m2s.get() + offset}, tile);
  });

  std::vector<int64_t> counts;
  if (layout.activation.planes && layout.activation.numel != 0) counts = {layout.activation.numel / channels};
  for (int64_t row = 0; !layout.activation.planes && row < layout.activation.rows(); row += layout.plan.row_tile) {
    counts.push_back(layout.activation.pixels({row, std::min(row + layout.plan.row_tile, layout.activation.rows())}));
  }
  std::vector<double> mean(static_cast<size_t>(channels)), var(static_cast<size_t>(channels));
  merge_moments(means.get(), m2s.get(), counts.data(), static_cast<int64_t>(counts.size()), channels, mean.data(),
                var.data());
  Tensor moments = empty_rows(arguments, 3);
  const double count = std::accumulate(counts.begin(), counts.end(), 0.0);
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    auto* out = static_cast<decltype(accumulator)*>(moments.mutable_data_ptr());
    out = std::copy(mean.begin(), mean.end(), out);
    out = std::copy(var.begin(), var.end(), out);
    std::transform(var.begin(), var.end(), out, [&](double v) { return v * (count / std::max(count - 1, 1.0)); });
  });
  return {moments, affine_of(arguments, moments, weights, biases, eps)};
}

// z of batch_norm_act into `out`, which is x itself or a tensor beside it.
void apply(const Arguments& arguments, const Tensor& x, const Tensor& affine, const OptionalTensor& residual,
           const OptionalTensor& residual_affine, bool relu, int64_t residual_channel, const Tensor& out) {
  check_batch_norm_act(arguments, affine, residual, residual_affine, residual_channel);

  const Layout layout(arguments);
  const ChannelRows scale_shift(affine, layout), residual_scale_shift(residual_affine, layout);
  const BatchNormAct op = {
      layout.activation,
      data(x),
      scale_shift[0],
      scale_shift[1],
      data(residual),
      residual_scale_shift[0],
      residual_scale_shift[1],
      out.mutable_data_ptr(),
      relu,
      // in place every line written is in the caches
      data(out) != data(x) && layout.streams({data(out)}, x.scalar_type()),
  };
  const bool has_part = residual.has_value() && residual->size(1) < arguments.channels();
  parallel_for_rows(layout.activation, [&](Range rows) {
    if (!has_part) return kernels().batch_norm_act(op, rows);
    for_each_strip<false>(layout, {residual_channel, residual->size(1)}, itemsize(x.scalar_type()), op.residual, rows,
                          [&](Range strip, const void* beside) {
                            BatchNormAct part = op;
                            part.residual = beside;
                            kernels().batch_norm_act(part, strip);
                          });
  });
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

// The mask of both backward passes.
MaskedGradient masked_gradient(const Tensor& grad, const OptionalTensor& z, const ChannelRows& affine, bool relu) {
  const Mask mask = !relu ? Mask::kNone : z.has_value() ? Mask::kOutput : Mask::kPreactivation;
  return {data(grad), mask, data(z), affine[0], affine[1]};
}

Tensor batch_norm_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& moments, const Tensor& affine,
                             const OptionalTensor& z, const OptionalTensor& residual,
                             const OptionalTensor& residual_moments, bool relu) {
  const Arguments arguments("batch_norm_act_reduce", "x", x);
  check_reduce(arguments, grad, moments, affine, z, residual, residual_moments);

  const Layout layout(arguments);
  const ChannelRows means(moments, layout), residual_means(residual_moments, layout), scale_shift(affine, layout);
  const MaskedGradient gradient = masked_gradient(grad, z, scale_shift, relu);

  const int64_t channels = arguments.channels(), parts = reduction_parts(layout);
  const int64_t rows = residual.has_value() ? 3 : 2;  // ΣG is the same for both branches
  const std::unique_ptr<double[]> partial(
      new double[static_cast<size_t>(std::max<int64_t>(parts, 1) * rows * channels)]);
  parallel_for_tiles(layout, [&](int64_t part, Tile tile) {
    double* sums = partial.get() + part * rows * channels;
    kernels().batch_norm_act_reduce({layout.activation, gradient, data(x), means[0], data(residual), residual_means[0],
                                     sums, sums + channels, sums + 2 * channels},
                                    tile);
  });

  std::vector<double> total(static_cast<size_t>(rows * channels));
  merge_sums(partial.get(), layout.activation.numel == 0 ? 0 : parts, rows * channels, total.data());
  Tensor sums = empty_rows(arguments, residual.has_value() ? 4 : 2);
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    auto* out = static_cast<decltype(accumulator)*>(sums.mutable_data_ptr());
    out = std::copy(total.begin(), total.begin() + 2 * channels, out);
    if (residual.has_value()) {
      out = std::copy(total.begin(), total.begin() + channels, out);
      std::copy(total.begin() + 2 * channels, total.end(), out);
    }
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_coefficients(const Tensor& sums, int64_t branch, const Tensor& moments,
                                                           const OptionalTensor& weight, double eps, int64_t count,
                                                           bool batch_stats) {
  const ChannelArguments arguments("batch_norm_coefficients", moments);
  check_sums(arguments, sums, branch);
  const Parameter weights(arguments, "weight", weight);
  const int64_t channels = arguments.channels();
  Tensor grad_weight = empty_channels(arguments), grad_bias = empty_channels(arguments);
  Tensor coefficients = empty_rows(arguments, batch_stats ? 4 : 1);
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    using A = decltype(accumulator);
    const A* sum_grad = static_cast<const A*>(data(sums)) + 2 * branch * channels;
    const A* mean = static_cast<const A*>(data(moments));
    finish_coefficients(sum_grad, sum_grad + channels, mean, mean + channels, weights.get(), eps, count, batch_stats,
                        channels, static_cast<A*>(grad_weight.mutable_data_ptr()),
                        static_cast<A*>(grad_bias.mutable_data_ptr()),
                        static_cast<A*>(coefficients.mutable_data_ptr()));
  });
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

  const Layout layout(arguments);
  const ChannelRows scale_shift(affine, layout), first(coefficients, layout), other(residual_coefficients, layout);
  Tensor dx = empty_beside(x);
  const bool branch = residual.has_value();
  const bool write_masked = masked_channels != 0 && !branch;
  const bool has_part = write_masked && masked_channels < arguments.channels();
  Tensor second = branch         ? empty_beside(grad)
                  : write_masked ? empty_part(arguments, grad, masked_channels)
                                 : nothing(grad);
  void* second_data = second.mutable_data_ptr();
  // a strip is read again at once
  const bool stream =
      layout.streams({data(dx), second_data}, x.scalar_type()) && !(has_part && arguments.channels_last());
  const BatchNormActBackward op = {
      layout.activation,
      masked_gradient(grad, z, scale_shift, relu),
      data(x),
      {first[0], first[1], first[2], first[3]},
      dx.mutable_data_ptr(),
      write_masked ? second_data : nullptr,
      data(residual),
      {other[0], other[1], other[2], other[3]},
      branch ? second_data : nullptr,
      nullptr,
      relu,
      stream,
  };
  parallel_for_rows(layout.activation, [&](Range rows) {
    if (!has_part) return kernels().batch_norm_act_backward(op, rows);
    for_each_strip<true>(layout, {masked_channel, masked_channels}, itemsize(x.scalar_type()), second_data, rows,
                         [&](Range strip, void* beside) {
                           BatchNormActBackward part = op;
                           part.masked = beside;
                           kernels().batch_norm_act_backward(part, strip);
                         });
  });
  return {dx, second};
}

// The gradient's memory becomes that of dx: one tensor less to allocate, and every line written is in the cache.  The
// activation costs its own writes alone, since x is being read.
Tensor batch_norm_act_backward_(const Tensor& grad, const Tensor& x, const Tensor& affine, const Tensor& coefficients,
                                const OptionalTensor& z, bool relu, bool wants_activation) {
  const Arguments arguments("batch_norm_act_backward_", "x", x);
  check_backward_in_place(arguments, grad, affine, coefficients, z, wants_activation);

  const Layout layout(arguments);
  const ChannelRows scale_shift(affine, layout), rows(coefficients, layout);
  Tensor activation = wants_activation ? empty_beside(x) : nothing(x);
  const BatchNormActBackward op = {
      layout.activation,
      masked_gradient(grad, z, scale_shift, relu),
      data(x),
      {rows[0], rows[1], rows[2], rows[3]},
      grad.mutable_data_ptr(),
      nullptr,
      nullptr,
      {},
      nullptr,
      wants_activation ? activation.mutable_data_ptr() : nullptr,
      relu,
      layout.streams({data(activation)}, x.scalar_type()),
  };
  parallel_for_rows(layout.activation, [&](Range range) { kernels().batch_norm_act_backward(op, range); });
  return activation;
}

// G of masked_grad into `out`, which is grad itself or a tensor beside it; returns its sums.
Tensor mask(const Arguments& arguments, const Tensor& grad, const OptionalTensor& other, const Tensor& z,
            const Tensor& out) {
  check_masked_grad(arguments, other, z);
  const Layout layout(arguments);
  Tensor sum_grad = empty_channels(arguments);
  const int64_t channels = arguments.channels(), parts = reduction_parts(layout);
  const std::unique_ptr<double[]> partial(new double[static_cast<size_t>(std::max<int64_t>(parts, 1) * channels)]);
  // in place every line written is in the caches
  const bool stream = data(out) != data(grad) && layout.streams({data(out)}, grad.scalar_type());
  parallel_for_tiles(layout, [&](int64_t part, Tile tile) {
    kernels().masked_grad({layout.activation, data(grad), data(other), data(z), out.mutable_data_ptr(),
                           partial.get() + part * channels, stream},
                          tile);
  });
  std::vector<double> total(static_cast<size_t>(channels));
  merge_sums(partial.get(), layout.activation.numel == 0 ? 0 : parts, channels, total.data());
  visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
    std::copy(total.begin(), total.end(), static_cast<decltype(accumulator)*>(sum_grad.mutable_data_ptr()));
  });
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

  const Layout layout(arguments);
  const AddMasked op = {layout.activation, data(grad), relu ? data(z) : nullptr, dx.mutable_data_ptr()};
  parallel_for_rows(layout.activation, [&](Range rows) { kernels().add_masked(op, rows); });
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
    visit_accumulator(arguments.accumulator(), [&](auto accumulator) {
      const auto* batch = static_cast<const decltype(accumulator)*>(data(moments[i]));
      const auto move = [&](const char* name, const Tensor& running, const auto* values) {
        visit_parameter(arguments, name, running,
                        [&](auto* target) { move_running(target, running.stride(0), values, weight, channels); });
      };
      move("means", means[i], batch);
      move("variances", variances[i], batch + 2 * channels);
    });
  }
}

// ---- max pool

void check_window(const Arguments& arguments, const Sizes& kernel_size, const Sizes& stride, const Sizes& padding) {
  const auto check = [&](const char* name, const Sizes& values, int64_t least) {
    if (values.size() == 2 && values[0] >= least && values[1] >= least) return;
    arguments.fail(name, "two values, each at least " + std::to_string(least), to_string(values));
  };
  check("kernel_size", kernel_size, 1);
  check("stride", stride, 1);
  check("padding", padding, 0);
  if (kernel_size[0] > 256 || kernel_size[1] > 256 || kernel_size[0] * kernel_size[1] > 256) {
    arguments.fail("kernel_size", "at most 256 elements, since an index is one byte", to_string(kernel_size));
  }
  if (padding[0] > kernel_size[0] / 2 || padding[1] > kernel_size[1] / 2) {
    arguments.fail("padding", "at most half of kernel_size, " + to_string(kernel_size), to_string(padding));
  }
}

PoolShape pool_shape(const Arguments& arguments, const Sizes& size, const Sizes& kernel_size, const Sizes& stride,
                     const Sizes& padding) {
  PoolShape shape{};
  const Sizes s = arguments.sizes();
  shape.dtype = arguments.dtype();
  shape.images = arguments.channels_last() ? s[0] : s[0] * s[1];
  shape.channels = arguments.channels_last() ? s[1] : 1;
  shape.planes = arguments.channels_last() ? 0 : s[1];
  shape.height = size[0];
  shape.width = size[1];
  for (size_t i = 0; i < 2; ++i) {
    shape.kernel[i] = kernel_size[i];
    shape.stride[i] = stride[i];
    shape.padding[i] = padding[i];
    const int64_t room = size[i] + 2 * padding[i] - kernel_size[i];
    if (room < 0) {
      arguments.fail("kernel_size", "at most the padded size of the image, " + to_string(size), to_string(kernel_size));
    }
    (i == 0 ? shape.out_height : shape.out_width) = room / stride[i] + 1;
  }
  return shape;
}

std::tuple<Tensor, Tensor> batch_norm_act_pool(const Tensor& x, const Tensor& affine, bool relu,
                                               const Sizes& kernel_size, const Sizes& stride, const Sizes& padding) {
  const Arguments arguments("batch_norm_act_pool", "x", x);
  arguments.check_channels("affine", affine, 2);
  check_window(arguments, kernel_size, stride, padding);
  const PoolShape shape = pool_shape(arguments, {x.size(2), x.size(3)}, kernel_size, stride, padding);
  const Sizes out_sizes = {x.size(0), x.size(1), shape.out_height, shape.out_width};
  Tensor z = empty_image(arguments, out_sizes, x.scalar_type());
  Tensor index = empty_image(arguments, out_sizes, ScalarType::Byte);

  const int64_t accumulator_size = itemsize(arguments.accumulator());
  const char* scale = static_cast<const char*>(data(affine));
  const BatchNormActPool op = {
      shape,
      data(x),
      scale,
      scale + arguments.channels() * accumulator_size,
      z.mutable_data_ptr(),
      static_cast<uint8_t*>(index.mutable_data_ptr()),
      relu,
  };
  const int64_t pitch = shape.width * shape.channels;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, pitch * shape.stride[0]));
  torch::stable::parallel_for(0, shape.images * shape.out_height, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(shape.kernel[0] * pitch * accumulator_size)]);
    kernels().batch_norm_act_pool(op, {begin, end}, scratch.get());
  });
  return {z, index};
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& index, const Sizes& size, const Sizes& kernel_size,
                         const Sizes& stride, const Sizes& padding) {
  const Arguments arguments("max_pool_backward", "grad", grad);
  arguments.check_like("index", index, ScalarType::Byte);
  check_window(arguments, kernel_size, stride, padding);
  if (size.size() != 2) arguments.fail("size", "two values [H, W]", to_string(size));
  const PoolShape shape = pool_shape(arguments, size, kernel_size, stride, padding);
  if (shape.out_height != grad.size(2) || shape.out_width != grad.size(3)) {
    arguments.fail("grad", "the pooled size, " + to_string({shape.out_height, shape.out_width}),
                   to_string({grad.size(2), grad.size(3)}));
  }
  Tensor dx = empty_image(arguments, {grad.size(0), grad.size(1), size[0], size[1]}, grad.scalar_type());
  const MaxPoolBackward op = {shape, data(grad), static_cast<const uint8_t*>(data(index)), dx.mutable_data_ptr()};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, shape.width * shape.channels));
  torch::stable::parallel_for(0, shape.images * shape.height, grain,
                              [&](int64_t begin, int64_t end) { kernels().max_pool_backward(op, {begin, end}); });
  return dx;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m) {
  m.impl("batch_norm_stats", TORCH_BOX(&fused_resnet::batch_norm_stats));
  m.impl("batch_norm_affine", TORCH_BOX(&fused_resnet::batch_norm_affine));
  m.impl("batch_norm_act", TORCH_BOX(&fused_resnet::batch_norm_act));
  m.impl("batch_norm_act_", TORCH_BOX(&fused_resnet::batch_norm_act_));
  m.impl("batch_norm_act_reduce", TORCH_BOX(&fused_resnet::batch_norm_act_reduce));
  m.impl("batch_norm_coefficients", TORCH_BOX(&fused_resnet::batch_norm_coefficients));
  m.impl("batch_norm_act_backward", TORCH_BOX(&fused_resnet::batch_norm_act_backward));
  m.impl("batch_norm_act_backward_", TORCH_BOX(&fused_resnet::batch_norm_act_backward_));
  m.impl("update_running_stats_", TORCH_BOX(&fused_resnet::update_running_stats_));
  m.impl("masked_grad", TORCH_BOX(&fused_resnet::masked_grad));
  m.impl("masked_grad_", TORCH_BOX(&fused_resnet::masked_grad_));
  m.impl("add_masked_", TORCH_BOX(&fused_resnet::add_masked_));
  m.impl("batch_norm_act_pool", TORCH_BOX(&fused_resnet::batch_norm_act_pool));
  m.impl("max_pool_backward", TORCH_BOX(&fused_resnet::max_pool_backward));
}
