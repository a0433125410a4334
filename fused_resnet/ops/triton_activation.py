"""The activations of ``activation.py`` for Triton: value and gradient, once for every kernel.

``v`` is float32, ALPHA and BETA are an Act's constants.  What is finite comes out finite, and a NaN as a NaN but for a
gradient that NaN does not stop, as stock's.
"""

import math

import triton
import triton.language as tl

from fused_resnet.ops.activation import Kind

# a kernel reads no Enum
NONE = tl.constexpr(int(Kind.NONE))
RELU = tl.constexpr(int(Kind.RELU))
LEAKY_RELU = tl.constexpr(int(Kind.LEAKY_RELU))
HARDTANH = tl.constexpr(int(Kind.HARDTANH))
SILU = tl.constexpr(int(Kind.SILU))
HARDSWISH = tl.constexpr(int(Kind.HARDSWISH))
GELU = tl.constexpr(int(Kind.GELU))
GELU_TANH = tl.constexpr(int(Kind.GELU_TANH))

SIXTH = tl.constexpr(1 / 6)
THIRD = tl.constexpr(1 / 3)
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))
CUBIC = tl.constexpr(0.044715)
TWICE_ROOT = tl.constexpr(2 * math.sqrt(2 / math.pi))
SATURATED = tl.constexpr(10.0)  # σ(2u) is 1e-38 or 1 there, and exp(−2u) is finite


@triton.jit
def act(v, ACT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """``act(v)``"""
    if ACT == RELU:
        v = relu(v)
    elif ACT == LEAKY_RELU:
        v = tl.where(v > 0, v, ALPHA * v)
    elif ACT == HARDTANH:
        v = tl.maximum(v, ALPHA, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, BETA, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == SILU:
        v *= tl.sigmoid(v)
    elif ACT == HARDSWISH:
        # a sixth of the gate, since 6·v may be infinite
        v *= tl.minimum(tl.maximum(v + 3.0, 0.0), 6.0) * SIXTH
    elif ACT == GELU:
        v *= _normal(v)
    elif ACT == GELU_TANH:
        v /= 1.0 + _odds(v)
    return v


@triton.jit
def act_grad(grad, v, ACT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """``G = grad·act'(v)``"""
    if ACT == RELU:
        grad = relu_grad(grad, v)
    elif ACT == LEAKY_RELU:
        grad = tl.where(v > 0, grad, ALPHA * grad)
    elif ACT == HARDTANH:
        grad = tl.where((v <= ALPHA) | (v >= BETA), 0.0, grad)
    elif ACT == SILU:
        s = tl.sigmoid(v)
        grad *= s * (1.0 + v * (1.0 - s))
    elif ACT == HARDSWISH:
        grad = tl.where(v <= -3.0, 0.0, tl.where(v >= 3.0, grad, grad * (v * THIRD + 0.5)))
    elif ACT == GELU:
        grad *= _normal(v) + v * (tl.exp(-0.5 * (v * v)) * DENSITY_AT_0)
    elif ACT == GELU_TANH:
        # further out 1 − σ = 0 would be multiplied by an infinite v²
        v = tl.maximum(v, -SATURATED, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, SATURATED, propagate_nan=tl.PropagateNan.ALL)
        odds = _odds(v)
        s = 1.0 / (1.0 + odds)
        # odds·σ is 1 − σ without what the difference would cancel, which v³ makes large
        grad *= s * (1.0 + v * (odds * s) * (TWICE_ROOT + (3.0 * TWICE_ROOT * CUBIC) * (v * v)))
    return grad


@triton.jit
def relu(v):
    """``max(v, 0)``, which NaN passes."""
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_grad(grad, v):
    """``G``: grad, or 0 where ``v <= 0``; by ``z`` as by ``v``, of the same sign.  NaN passes."""
    return tl.where(v <= 0, 0.0, grad)


@triton.jit
def _normal(v):
    """``Φ(v) = (1 + erf(v/√2))/2``"""
    return 0.5 + 0.5 * tl.erf(v * SQRT_HALF)


@triton.jit
def _odds(v):
    """``exp(−2u) = 1/σ(2u) − 1``, ``u = √(2/π)(v + c·v³)``"""
    return tl.exp(-v * (TWICE_ROOT + (TWICE_ROOT * CUBIC) * v * v))
