// The activations on vectors: a structure for each, with its value(v) and the gradient(grad, v) = grad·act'(v), and a
// line of visit_act.  The formulas are those of fused_resnet/ops/activation.py.
//
// No activation and a ReLU need none of this: they are a floor, or a mask, in the loop of a kernel that reads and
// writes (vector.h).  All others work on a chunk of elements in the accumulation dtype, which a kernel fills before and
// empties afterwards: the choice is made once a chunk, and the code is there once, whatever the kernels and their
// element types.
#pragma once

#include "vector.h"

namespace fused_resnet::cpu::FUSED_RESNET_ISA {

using Floats = Vector<float, kLanes<float>>;
using Doubles = Vector<double, kLanes<double>>;

// A chunk's elements: two of them lie in the L1 cache beside what is read and written.
inline constexpr int64_t kChunkElements = 512;

// `count` of them from the first on, padded with what nobody reads to whole vectors.
template <typename A>
constexpr int64_t whole_vectors(int64_t count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// Zeros at first: what pads is computed, too, and is to be ordinary numbers.
template <typename A, int64_t kElements = kChunkElements>
struct alignas(64) Chunk {
  A values[kElements] = {};
};

// ---- the functions that they are made of: float in vectors, double (which is there for checks) lane by lane

template <typename F>
FUSED_RESNET_INLINE Doubles each_lane(Doubles v, const F& f) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = f(v[i]);
  return v;
}

// |v| by its bits: of a choice between v and −v GCC makes two of whatever follows.
FUSED_RESNET_INLINE Floats magnitude(Floats v) { return (Floats)((Vector<int32_t, kLanes<float>>)v & 0x7fffffff); }
FUSED_RESNET_INLINE Doubles magnitude(Doubles v) {
  return (Doubles)((Vector<int64_t, kLanes<double>>)v & 0x7fffffffffffffff);
}

// e^v = 2^n·e^r, with n = round(v/ln2), |r| <= ln2/2; 2^n is two factors, so that it overflows and underflows where e^v
// does.  e^r = 1 + r + r²·P(r), P of degree 4 by Lawson's weighted least squares on [-0.3468, 0.3468]: to 3.1e-9
// relative.
FUSED_RESNET_INLINE Floats exponential(Floats v) {
  using Bits = Vector<int32_t, kLanes<float>>;
  // from here on the result is 0 or infinite; NaN stays
  Floats x = v < -104.0f ? splat<Floats>(-104.0f) : v;
  x = x > 89.0f ? splat<Floats>(89.0f) : x;
  constexpr float kRound = 0x1.8p23f;  // added, it leaves an integer in the last bits
  const Floats shifted = x * 0x1.715476p0f + kRound, n = shifted - kRound;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // the first product is exact
  Floats p = splat<Floats>(1.381451643e-03f);
  p = p * r + 8.368756048e-03f;
  p = p * r + 4.166839186e-02f;
  p = p * r + 1.666652031e-01f;
  p = p * r + 4.999999343e-01f;
  p = 1.0f + (r + r * r * p);
  const Bits exponent = (Bits)shifted - 0x4b400000, half = exponent >> 1;
  return p * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
}
FUSED_RESNET_INLINE Doubles exponential(Doubles v) {
  return each_lane(v, [](double x) { return __builtin_exp(x); });
}

// σ(v) = 1/(1 + e^−v) and σ'(v) = σ(v)·(1 − σ(v)), of e^−|v|, so that neither overflows nor loses digits.
template <typename V>
struct Logistic {
  FUSED_RESNET_INLINE explicit Logistic(V v) {
    const V e = exponential(V(-magnitude(v))), q = 1 / (1 + e);
    value = v < 0 ? e * q : q;
    slope = e * q * q;
  }

  V value, slope;
};

// Φ(v), of bell = e^(−v²/2):  Φ(−|v|) = bell·t·P(t), t = 1/(1 + 0.34·|v|).  P of degree 8 by the same means for |v|
// <= 14.5, beyond which bell is 0: to 3.4e-8 relative, so that the tail of small values keeps its digits.
FUSED_RESNET_INLINE Floats normal(Floats v, Floats bell) {
  const Floats t = 1 / (1 + 0.34f * magnitude(v));
  Floats p = splat<Floats>(-2.587649220e-02f);
  p = p * t + 1.383573198e-01f;
  p = p * t - 2.708715080e-01f;
  p = p * t + 1.997180754e-01f;
  p = p * t - 4.310657923e-02f;
  p = p * t + 1.147137097e-01f;
  p = p * t + 1.153516803e-01f;
  p = p * t + 1.360922320e-01f;
  p = p * t + 1.356215792e-01f;
  p = p * t * bell;
  return v > 0 ? 1 - p : p;
}
FUSED_RESNET_INLINE Doubles normal(Doubles v, Doubles) {
  return each_lane(v, [](double x) { return __builtin_erfc(x * -0.70710678118654752) / 2; });
}

// ---- the activations

template <typename A>
struct LeakyRelu {
  explicit LeakyRelu(const Act& act) : slope(static_cast<A>(act.alpha)) {}

  template <typename V>
  FUSED_RESNET_INLINE V value(V v) const {
    return v > 0 ? v : slope * v;
  }
  template <typename V>
  FUSED_RESNET_INLINE V gradient(V grad, V v) const {
    return v > 0 ? grad : slope * grad;
  }

  A slope;
};

template <typename A>
struct Hardtanh {
  explicit Hardtanh(const Act& act) : least(static_cast<A>(act.alpha)), most(static_cast<A>(act.beta)) {}

  template <typename V>
  FUSED_RESNET_INLINE V value(V v) const {
    v = at_least(least, v);
    return v > most ? splat<V>(most) : v;
  }
  template <typename V>
  FUSED_RESNET_INLINE V gradient(V grad, V v) const {
    return (v <= least) | (v >= most) ? V{} : grad;
  }

  A least, most;
};

template <typename A>
struct Silu {
  explicit Silu(const Act&) {}

  template <typename V>
  FUSED_RESNET_INLINE V value(V v) const {
    return v / (1 + exponential(-v));
  }
  // σ + σ'·v
  template <typename V>
  FUSED_RESNET_INLINE V gradient(V grad, V v) const {
    const Logistic<V> s(v);
    return grad * (s.value + s.slope * v);
  }
};

template <typename A>
struct Hardswish {
  explicit Hardswish(const Act&) {}

  template <typename V>
  FUSED_RESNET_INLINE V value(V v) const {
    const V gate = at_least(A{0}, V(v + 3));
    return v * ((gate > 6 ? splat<V>(A{6}) : gate) * static_cast<A>(1.0 / 6));
  }
  template <typename V>
  FUSED_RESNET_INLINE V gradient(V grad, V v) const {
    const V slope = v * static_cast<A>(1.0 / 3) + static_cast<A>(0.5);
    return v <= -3 ? V{} : v >= 3 ? grad : grad * slope;
  }
};

template <typename A>
struct Gelu {
  explicit Gelu(const Act&) {}

  template <typename V>
  FUSED_RESNET_INLINE V value(V v) const {
    return v * normal(v, bell(v));
  }
  template <typename V>
  FUSED_RESNET_INLINE V gradient(V grad, V v) const {
    const V e = bell(v);
    return grad * (normal(v, e) + v * (e * static_cast<A>(0.39894228040143268)));  // 1/√(2π)
  }
  template <typename V>
  FUSED_RESNET_INLINE static V bell(V v) {
    return exponential(V(v * v * static_cast<A>(-0.5)));
  }
};

template <typename A>
struct GeluTanh {
  explicit GeluTanh(const Act&) {}

  // 2u = 2·√(2/π)·(v + c·v³)
  static constexpr A kSlope = static_cast<A>(1.5957691216057308), kCube = static_cast<A>(0.044715);

  template <typename V>
  FUSED_RESNET_INLINE V value(V v) const {
    return v / (1 + exponential(V(v * (v * v * kCube + 1) * -kSlope)));
  }
  // σ + σ'·2u'·v; u' is bounded, where the slope has long been 0
  template <typename V>
  FUSED_RESNET_INLINE V gradient(V grad, V v) const {
    const V square = v * v, bounded = square > 1000 ? splat<V>(A{1000}) : square;
    const Logistic<V> s(V(v * (square * kCube + 1) * kSlope));
    return grad * (s.value + s.slope * v * ((bounded * (3 * kCube) + 1) * kSlope));
  }
};

// visitor(activation) with the structure of what is more than a floor.
template <typename A, typename Visitor>
FUSED_RESNET_INLINE void visit_act(const Act& act, const Visitor& visitor) {
  switch (act.kind) {
    case ActKind::kNone:
    case ActKind::kRelu:
      return;
    case ActKind::kLeakyRelu:
      return visitor(LeakyRelu<A>(act));
    case ActKind::kHardtanh:
      return visitor(Hardtanh<A>(act));
    case ActKind::kSilu:
      return visitor(Silu<A>(act));
    case ActKind::kHardswish:
      return visitor(Hardswish<A>(act));
    case ActKind::kGelu:
      return visitor(Gelu<A>(act));
    case ActKind::kGeluTanh:
      return visitor(GeluTanh<A>(act));
  }
}

// ---- chunks

// v = act(v), of `count` elements and what pads them.
template <typename A>
void activate(const Act& act, A* v, int64_t count) {
  constexpr Lanes<kLanes<A>> lanes;
  visit_act<A>(act, [&](const auto& activation) __attribute__((always_inline)) {
    for (int64_t j = 0; j < count; j += kLanes<A>) store(lanes, v + j, activation.value(load(lanes, v + j)));
  });
}

// grad = grad·act'(v), likewise.
template <typename A>
void multiply_by_gradient(const Act& act, A* grad, const A* v, int64_t count) {
  constexpr Lanes<kLanes<A>> lanes;
  visit_act<A>(act, [&](const auto& activation) __attribute__((always_inline)) {
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      store(lanes, grad + j, activation.gradient(load(lanes, grad + j), load(lanes, v + j)));
    }
  });
}

// visitor(first, count) over chunks of [0, n).
template <typename Visitor>
FUSED_RESNET_INLINE void for_each_chunk(int64_t n, const Visitor& visitor) {
  for (int64_t first = 0; first < n; first += kChunkElements) {
    visitor(first, n - first < kChunkElements ? n - first : kChunkElements);
  }
}

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
