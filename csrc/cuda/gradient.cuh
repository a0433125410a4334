// G of the gradient that comes in: what masks it, or which factor it has.
#pragma once

#include "activation.cuh"

namespace fused_resnet::cuda {

// What G = grad·act'(v) is made of.  A ReLU's is grad or 0 by the sign of z, or of a·x + b; there is no z where there
// is no activation.  Of any other the value of z, or of a·x + b, decides.
enum class Mask { kOutput, kPreactivation, kActOfOutput, kActOfPreactivation };

template <Mask kMask>
inline constexpr bool kIsAct = kMask == Mask::kActOfOutput || kMask == Mask::kActOfPreactivation;
template <Mask kMask>
inline constexpr bool kOfPreactivation = kMask == Mask::kPreactivation || kMask == Mask::kActOfPreactivation;

// of_preactivation: a kernel that computes a·x + b anyway.
inline Mask mask_of(const MaskedGradient& op, bool of_preactivation = false) {
  of_preactivation = of_preactivation || (op.act.kind != ActKind::kNone && op.z == nullptr);
  if (is_simple(op.act)) return of_preactivation ? Mask::kPreactivation : Mask::kOutput;
  return of_preactivation ? Mask::kActOfPreactivation : Mask::kActOfOutput;
}

// MaskedGradient for elements of type T.
template <typename T, int kVector, int kRows, Mask kMask>
struct Gradient {
  using Values = Packed<T, kVector>[kRows];

  __device__ Gradient(const MaskedGradient& op, const Position<kVector>& position, int64_t channels)
      : grad(static_cast<const T*>(op.grad)), z(static_cast<const T*>(op.z)), act(op.act) {
    if constexpr (kOfPreactivation<kMask>) {
      load_channels(floats(op.affine) + position.channel, scale);
      load_channels(floats(op.affine) + channels + position.channel, shift);
    }
  }

  // Starts the loads of a batch.
  __device__ void load(const Batch<kRows>& batch) {
    batch.load(grad, grads);
    if (!kOfPreactivation<kMask> && (kIsAct<kMask> || z != nullptr)) batch.load(z, outputs);
  }

  // G of row i of the batch, whose input of the batch norm is x; the sign of a preactivation masks where there is a
  // ReLU.  NaN passes, as in stock torch.
  __device__ void masked(int i, const float (&x)[kVector], float (&g)[kVector], bool relu = true) const {
    grads[i].unpack(g);
    if constexpr (kMask == Mask::kPreactivation) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) g[v] = relu && fmaf(scale[v], x[v], shift[v]) <= 0 ? 0 : g[v];
    } else if constexpr (kIsAct<kMask>) {
      float values[kVector];
      if constexpr (kMask == Mask::kActOfOutput) {
        outputs[i].unpack(values);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) values[v] = fmaf(scale[v], x[v], shift[v]);
      }
      multiply_by_gradient(act, g, values);
    } else if (z != nullptr) {
      float values[kVector];
      outputs[i].unpack(values);
#pragma unroll
      for (int v = 0; v < kVector; ++v) g[v] = values[v] <= 0 ? 0 : g[v];
    }
  }

  const T* grad;
  const T* z;  // or null
  const Act& act;
  float scale[kVector], shift[kVector];
  Values grads, outputs;
};

template <typename Visitor>
cudaError_t visit_mask(Mask mask, const Visitor& visitor) {
  switch (mask) {
    case Mask::kOutput:
      return visitor(Constant<Mask::kOutput>{});
    case Mask::kPreactivation:
      return visitor(Constant<Mask::kPreactivation>{});
    case Mask::kActOfOutput:
      return visitor(Constant<Mask::kActOfOutput>{});
    case Mask::kActOfPreactivation:
      return visitor(Constant<Mask::kActOfPreactivation>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace fused_resnet::cuda
