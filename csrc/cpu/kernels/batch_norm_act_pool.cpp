#include "activation.h"
#include "kernels_isa.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {
namespace {

// Positions of a window that lie inside the image, along one dimension.
Range window(int64_t start, int64_t kernel, int64_t size) {
  const int64_t begin = start < 0 ? -start : 0;
  const int64_t end = size - start;
  return {begin, end < kernel ? end : kernel};
}

// One row of act(a·x + b), rounded as if it had been stored, since ties are decided among the rounded values.
template <typename T, bool kBroadcast, bool kFloor>
void activate_row(const BatchNormActPool& op, int64_t image, int64_t row, Accumulator<T>* out) {
  using A = Accumulator<T>;
  const PoolShape& shape = op.shape;
  const int64_t inner = kBroadcast ? shape.width : shape.channels;  // columns that one Coefficient covers
  const int64_t outer = kBroadcast ? 1 : shape.width;
  const int64_t channel = kBroadcast ? image % shape.planes : 0;
  const T* x = static_cast<const T*>(op.x) + (image * shape.height + row) * inner * outer;
  const Coefficient<A, kBroadcast> scale(op.scale, channel), shift(op.shift, channel);
  const A floor = floor_of<A>(op.act);
  Chunk<A, kFloor ? 1 : kChunkElements> chunk;
  for (int64_t base = 0; base < inner * outer; base += inner) {
    const auto normed = [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      return Vector<A, decltype(lanes)::value>(load(lanes, x + base + j) * scale(lanes, j) + shift(lanes, j));
    };
    if constexpr (kFloor) {
      for_each_vector<T>(inner, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        store(lanes, out + base + j, rounded_to<T>(lanes, at_least(floor, normed(lanes, j))));
      });
    } else {
      for_each_chunk(inner, [&](int64_t first, int64_t count) __attribute__((always_inline)) {
        for_each_vector<T>(count, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
          store(lanes, chunk.values + j, normed(lanes, first + j));
        });
        activate(op.act, chunk.values, count);
        for_each_vector<T>(count, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
          store(lanes, out + base + first + j, rounded_to<T>(lanes, load(lanes, chunk.values + j)));
        });
      });
    }
  }
}

// One row of the output from the ring of activated rows: input row h lies in slot h % kernel height.
template <typename T>
void pool_row(const BatchNormActPool& op, int64_t row, const Accumulator<T>* ring) {
  using A = Accumulator<T>;
  using I = Integer<A>;
  const PoolShape& shape = op.shape;
  const int64_t pitch = shape.width * shape.channels;
  const int64_t first_row = row % shape.out_height * shape.stride[0] - shape.padding[0];
  const Range rows = window(first_row, shape.kernel[0], shape.height);
  for (int64_t column = 0; column < shape.out_width; ++column) {
    const int64_t first_column = column * shape.stride[1] - shape.padding[1];
    const Range columns = window(first_column, shape.kernel[1], shape.width);
    const int64_t out = (row * shape.out_width + column) * shape.channels;
    for_each_vector<T>(shape.channels, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
      using V = Vector<A, decltype(lanes)::value>;
      using P = Vector<I, decltype(lanes)::value>;
      V best = splat<V>(-static_cast<A>(__builtin_inf()));
      P place = splat<P>(static_cast<I>(rows.begin * shape.kernel[1] + columns.begin));
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const A* line = ring + (first_row + r) % shape.kernel[0] * pitch + first_column * shape.channels + j;
        for (int64_t c = columns.begin; c < columns.end; ++c) {
          const V value = load(lanes, line + c * shape.channels);
          const P wins = (value > best) | (value != value);
          best = wins ? value : best;
          place = wins ? splat<P>(static_cast<I>(r * shape.kernel[1] + c)) : place;
        }
      }
      store(lanes, static_cast<T*>(op.z) + out + j, best, false);
      store(lanes, op.index + out + j, to_bytes<I, decltype(lanes)::value>(place));
    });
  }
}

// Tile: some rows of the output.  Each input row is activated once a tile, into a ring of as many rows as a window has,
// which stays in the L2 cache.
template <typename T, bool kFloor>
void pool_rows(const BatchNormActPool& op, Range rows, Accumulator<T>* ring) {
  const PoolShape& shape = op.shape;
  const int64_t pitch = shape.width * shape.channels;
  int64_t image = -1, next = 0;  // rows below `next` of this image are activated
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t start = row % shape.out_height * shape.stride[0] - shape.padding[0];
    const Range inside = window(start, shape.kernel[0], shape.height);
    if (row / shape.out_height != image) {
      image = row / shape.out_height;
      next = 0;
    }
    if (next < start + inside.begin) next = start + inside.begin;
    for (; next < start + inside.end; ++next) {
      Accumulator<T>* line = ring + next % shape.kernel[0] * pitch;
      shape.planes != 0 ? activate_row<T, true, kFloor>(op, image, next, line)
                        : activate_row<T, false, kFloor>(op, image, next, line);
    }
    pool_row<T>(op, row, ring);
  }
}

// The windows of one dimension that hold an input position, for positions that only grow: without a division.
class Windows {
 public:
  Windows(int64_t kernel, int64_t stride, int64_t padding, int64_t count)
      : kernel_(kernel), stride_(stride), padding_(padding), count_(count) {}

  Range at(int64_t position) {
    while (range_.begin < count_ && start(range_.begin) + kernel_ <= position) ++range_.begin;
    while (range_.end < count_ && start(range_.end) <= position) ++range_.end;
    return range_;
  }

  int64_t start(int64_t window) const { return window * stride_ - padding_; }

 private:
  int64_t kernel_, stride_, padding_, count_;
  Range range_{0, 0};
};

// Tile: some rows of the input.  Every element gathers from the few windows that it lies in: no two threads write the
// same element, and the sum is rounded once.
template <typename T>
void pool_backward_rows(const MaxPoolBackward& op, Range rows) {
  using A = Accumulator<T>;
  using I = Integer<A>;
  const PoolShape& shape = op.shape;
  const T* grad = static_cast<const T*>(op.grad);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t image = row / shape.height, h = row % shape.height;
    Windows vertical(shape.kernel[0], shape.stride[0], shape.padding[0], shape.out_height);
    Windows horizontal(shape.kernel[1], shape.stride[1], shape.padding[1], shape.out_width);
    const Range above = vertical.at(h);
    for (int64_t w = 0; w < shape.width; ++w) {
      const Range left = horizontal.at(w);
      T* dx = static_cast<T*>(op.dx) + (row * shape.width + w) * shape.channels;
      for_each_vector<T>(shape.channels, [&](auto lanes, int64_t j) __attribute__((always_inline)) {
        using V = Vector<A, decltype(lanes)::value>;
        using P = Vector<I, decltype(lanes)::value>;
        V sum{};
        for (int64_t oh = above.begin; oh < above.end; ++oh) {
          const int64_t r = h - vertical.start(oh);
          for (int64_t ow = left.begin; ow < left.end; ++ow) {
            const int64_t c = w - horizontal.start(ow);
            const int64_t i = ((image * shape.out_height + oh) * shape.out_width + ow) * shape.channels + j;
            const P place = from_bytes<I, decltype(lanes)::value>(load(lanes, op.index + i));
            sum += place == splat<P>(static_cast<I>(r * shape.kernel[1] + c)) ? load(lanes, grad + i) : V{};
          }
        }
        store(lanes, dx + j, sum, false);
      });
    }
  }
}

}  // namespace

void batch_norm_act_pool(const BatchNormActPool& op, Range rows, void* scratch) {
  visit_dtype(op.shape.dtype, [&](auto element) {
    using T = decltype(element);
    visit_bool(is_floor(op.act),
               [&](auto floor) { pool_rows<T, floor.value>(op, rows, static_cast<Accumulator<T>*>(scratch)); });
  });
}

void max_pool_backward(const MaxPoolBackward& op, Range rows) {
  visit_dtype(op.shape.dtype, [&](auto element) { pool_backward_rows<decltype(element)>(op, rows); });
}

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
