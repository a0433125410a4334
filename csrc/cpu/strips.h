// Tensors that have a part of the channels, shown to the kernels as if they had all.
#pragma once

#include "layout.h"

namespace fused_resnet::cpu {

// Elements of the rows that are laid out at a time: a small part of the L1 cache, so that the loads of one strip are
// under way while the arithmetic of the one before is done.
inline constexpr int64_t kStripElements = 1 << 10;

struct alignas(64) CacheLine {
  char bytes[64];
};

inline char* shifted(const void* p, int64_t bytes) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes));
}

// A few moves where it can be: a call of memcpy would cost more.
inline void copy_pixel(char* to, const char* from, int64_t bytes) {
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
void for_each_strip(const Layout& layout, ChannelPart part, const void* tensor, Range rows, const Visitor& visitor) {
  const Activation& activation = layout.activation;
  const int64_t size = itemsize(activation.dtype);
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

}  // namespace fused_resnet::cpu
