"""The activations that the kernels know: their formulas, in plain torch, by which every engine's are tested.

An activation is a number of :class:`Kind` and up to two constants, which go through every operation side by side: a
dispatcher's schema has no structures.  ``v`` is ``a·x + b + R``; a NaN stays one.

===========  =======================================  =====================================================
kind         value                                    gradient by ``v``
===========  =======================================  =====================================================
NONE         ``v``                                    1
RELU         ``max(v, 0)``                            0 where ``v <= 0``, else 1
LEAKY_RELU   ``v`` where ``v > 0``, else ``alpha·v``  1 where ``v > 0``, else ``alpha``
HARDTANH     ``min(max(v, alpha), beta)``             0 where ``v <= alpha`` or ``v >= beta``, else 1
SILU         ``v·σ(v)``                               ``σ(v)·(1 + v·(1 − σ(v)))``
HARDSWISH    ``v·min(max(v + 3, 0), 6)/6``            0 where ``v <= −3``, 1 where ``v >= 3``, else ``v/3 + 1/2``
GELU         ``v·Φ(v)``                               ``Φ(v) + v·φ(v)``
GELU_TANH    ``v·σ(2u)``, ``u = √(2/π)(v + c·v³)``    ``σ(2u)·(1 + 2v·(1 − σ(2u))·√(2/π)(1 + 3c·v²))``
===========  =======================================  =====================================================

``σ`` is the logistic function, ``Φ`` and ``φ`` are the normal distribution and its density, ``c = 0.044715``;
``(1 + tanh(u))/2 = σ(2u)``.  Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Ramachandran et al., "Searching
for Activation Functions", 2017; Howard et al., "Searching for MobileNetV3", 2019.

Triton's are in ``triton_activation.py``, those of the CPU in ``csrc/cpu/kernels/activation.h``, CUDA's in
``csrc/cuda/activation.cuh``; the numbers again in ``csrc/ops/engine.h``.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Kind(IntEnum):
    """Which formula; a number in every schema."""

    NONE = 0
    RELU = 1
    LEAKY_RELU = 2
    HARDTANH = 3
    SILU = 4
    HARDSWISH = 5
    GELU = 6
    GELU_TANH = 7


class Act(NamedTuple):
    """An activation: a number of :class:`Kind`, and its constants where it has any."""

    kind: int
    alpha: float = 0.0
    beta: float = 0.0

    def __str__(self) -> str:
        """Return its name as ``explain`` prints it."""
        constants = {Kind.LEAKY_RELU: f"({self.alpha:g})", Kind.HARDTANH: f"({self.alpha:g}, {self.beta:g})"}
        return Kind(self.kind).name.lower() + constants.get(Kind(self.kind), "")


SCHEMA = "int act, float alpha, float beta"  # of an Act among an operation's arguments

NONE = Act(int(Kind.NONE))
RELU = Act(int(Kind.RELU))

# as torch's functions default to
BY_NAME = {kind.name.lower(): Act(int(kind)) for kind in Kind} | {
    "leaky_relu": Act(int(Kind.LEAKY_RELU), 0.01),
    "hardtanh": Act(int(Kind.HARDTANH), -1.0, 1.0),
    "relu6": Act(int(Kind.HARDTANH), 0.0, 6.0),
}
# one of each kind, for whoever tries them all
_CONSTANTS = {Kind.LEAKY_RELU: (0.1,), Kind.HARDTANH: (-1.0, 2.0)}
EXAMPLES = tuple(Act(int(kind), *_CONSTANTS.get(kind, ())) for kind in Kind)


def value(act: Act, v: Tensor) -> Tensor:
    """Return the activation of ``v``, of any shape and floating dtype, differentiable as often as stock's."""
    kind, alpha, beta = act
    if kind == Kind.RELU:
        return v.relu()
    if kind == Kind.LEAKY_RELU:
        return F.leaky_relu(v, alpha)
    if kind == Kind.HARDTANH:
        return F.hardtanh(v, alpha, beta)
    if kind == Kind.SILU:
        return F.silu(v)
    if kind == Kind.HARDSWISH:
        return F.hardswish(v)
    if kind in (Kind.GELU, Kind.GELU_TANH):
        return F.gelu(v, approximate=_approximation(kind))
    return v


def gradient(act: Act, grad: Tensor, v: Tensor) -> Tensor:
    """Return ``grad`` by the activation's gradient at ``v``, in the dtype of ``grad``."""
    kind, alpha, beta = act
    v = v.to(grad.dtype)
    aten = torch.ops.aten
    if kind == Kind.RELU:
        return torch.where(v <= 0, 0, grad)
    if kind == Kind.LEAKY_RELU:
        return torch.where(v > 0, grad, alpha * grad)
    if kind == Kind.HARDTANH:
        return torch.where((v <= alpha) | (v >= beta), 0, grad)
    if kind == Kind.SILU:
        return aten.silu_backward(grad, v)  # type: ignore[no-any-return]
    if kind == Kind.HARDSWISH:
        return aten.hardswish_backward(grad, v)  # type: ignore[no-any-return]
    if kind in (Kind.GELU, Kind.GELU_TANH):
        return aten.gelu_backward(grad, v, approximate=_approximation(kind))  # type: ignore[no-any-return]
    return grad


def _approximation(kind: int) -> str:
    return "tanh" if kind == Kind.GELU_TANH else "none"
