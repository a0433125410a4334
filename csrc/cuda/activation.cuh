// The activations: a structure for each, with its value(v) and the gradient(grad, v) = grad·act'(v), and a line of
// visit_act.  The formulas are those of fused_resnet/ops/activation.py.
//
// No activation and a ReLU need none of this (vector.cuh): their kernels are instances of their own.  All others share
// one, in which the choice is a branch that all threads take alike.
#pragma once

#include "vector.cuh"

namespace fused_resnet::cuda {

// σ(v) = 1/(1 + e^−v) and σ'(v) = σ(v)·(1 − σ(v)), of e^−|v|, so that neither overflows nor loses digits.
struct Logistic {
  __device__ explicit Logistic(float v) {
    const float e = exp2f(-1.44269504f * fabsf(v)), q = __fdividef(1, 1 + e);
    value = v < 0 ? e * q : q;
    slope = e * q * q;
  }

  float value, slope;
};

struct LeakyRelu {
  __device__ explicit LeakyRelu(const Act& act) : slope(static_cast<float>(act.alpha)) {}
  __device__ float value(float v) const { return v > 0 ? v : slope * v; }
  __device__ float gradient(float grad, float v) const { return v > 0 ? grad : slope * grad; }

  float slope;
};

struct Hardtanh {
  __device__ explicit Hardtanh(const Act& act)
      : least(static_cast<float>(act.alpha)), most(static_cast<float>(act.beta)) {}
  // NaN passes, which fminf and fmaxf would drop
  __device__ float value(float v) const {
    v = v < least ? least : v;
    return v > most ? most : v;
  }
  __device__ float gradient(float grad, float v) const { return v <= least || v >= most ? 0 : grad; }

  float least, most;
};

struct Silu {
  __device__ explicit Silu(const Act&) {}
  __device__ float value(float v) const { return v * Logistic(v).value; }
  // σ + σ'·v
  __device__ float gradient(float grad, float v) const {
    const Logistic s(v);
    return grad * fmaf(s.slope, v, s.value);
  }
};

struct Hardswish {
  __device__ explicit Hardswish(const Act&) {}
  __device__ float value(float v) const { return v * (fminf(fmaxf(v + 3, 0), 6) * (1.0f / 6)); }
  __device__ float gradient(float grad, float v) const {
    return v <= -3 ? 0 : v >= 3 ? grad : grad * fmaf(v, 1.0f / 3, 0.5f);
  }
};

struct Gelu {
  __device__ explicit Gelu(const Act&) {}
  __device__ float value(float v) const { return v * normal(v, bell(v)); }
  // Φ + v·φ, φ = e^(−v²/2)/√(2π)
  __device__ float gradient(float grad, float v) const {
    const float e = bell(v);
    return grad * fmaf(v, 0.398942280f * e, normal(v, e));
  }
  // e^(−v²/2)
  __device__ static float bell(float v) { return exp2f(-0.721347520f * v * v); }
  // Φ(v) by the polynomial of the CPU's kernels, csrc/cpu/kernels/activation.h: the gradient's exponential serves it,
  // too.
  __device__ static float normal(float v, float bell) {
    const float t = __fdividef(1, fmaf(0.34f, fabsf(v), 1));
    float p = fmaf(-2.587649220e-02f, t, 1.383573198e-01f);
    p = fmaf(p, t, -2.708715080e-01f);
    p = fmaf(p, t, 1.997180754e-01f);
    p = fmaf(p, t, -4.310657923e-02f);
    p = fmaf(p, t, 1.147137097e-01f);
    p = fmaf(p, t, 1.153516803e-01f);
    p = fmaf(p, t, 1.360922320e-01f);
    p = fmaf(p, t, 1.356215792e-01f) * t * bell;
    return v > 0 ? 1 - p : p;
  }
};

struct GeluTanh {
  __device__ explicit GeluTanh(const Act&) {}
  // 2u = 2·√(2/π)·(v + c·v³)
  static constexpr float kSlope = 1.59576912f, kCube = 0.044715f;
  __device__ float value(float v) const { return v * Logistic(v * (kSlope * fmaf(kCube * v, v, 1))).value; }
  // σ + σ'·2u'·v; u' is bounded, where the slope has long been 0
  __device__ float gradient(float grad, float v) const {
    const float square = v * v;
    const Logistic s(v * (kSlope * fmaf(kCube, square, 1)));
    return grad * fmaf(s.slope * v, kSlope * fmaf(3 * kCube, fminf(square, 1000), 1), s.value);
  }
};

// visitor(activation) with the structure of what is neither none nor a ReLU.
template <typename Visitor>
__device__ void visit_act(const Act& act, const Visitor& visitor) {
  switch (act.kind) {
    case ActKind::kNone:
    case ActKind::kRelu:
      return;
    case ActKind::kLeakyRelu:
      return visitor(LeakyRelu(act));
    case ActKind::kHardtanh:
      return visitor(Hardtanh(act));
    case ActKind::kSilu:
      return visitor(Silu(act));
    case ActKind::kHardswish:
      return visitor(Hardswish(act));
    case ActKind::kGelu:
      return visitor(Gelu(act));
    case ActKind::kGeluTanh:
      return visitor(GeluTanh(act));
  }
}

// None or a ReLU.
inline bool is_simple(const Act& act) { return act.kind == ActKind::kNone || act.kind == ActKind::kRelu; }

// v = act(v).  NaN passes, as in stock torch.
template <bool kSimple, int kVector>
__device__ void apply_act(const Act& act, float (&v)[kVector]) {
  if constexpr (kSimple) {
    if (act.kind == ActKind::kNone) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = v[i] <= 0 ? 0 : v[i];
  } else {
    visit_act(act, [&](const auto& activation) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = activation.value(v[i]);
    });
  }
}

// grad = grad·act'(v), of what is neither none nor a ReLU.
template <int kVector>
__device__ void multiply_by_gradient(const Act& act, float (&grad)[kVector], const float (&v)[kVector]) {
  visit_act(act, [&](const auto& activation) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) grad[i] = activation.gradient(grad[i], v[i]);
  });
}

}  // namespace fused_resnet::cuda
