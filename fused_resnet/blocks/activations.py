"""The activations that a chain can hold, by all the names that a forward has for them.

What they compute is :mod:`fused_resnet.ops.activation`'s; how another one is added, CONTRIBUTING.md says.
"""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.blocks.subclasses import layer_class
from fused_resnet.ops.activation import BY_NAME, RELU, Act, Kind

SILU, HARDSWISH = BY_NAME["silu"], BY_NAME["hardswish"]
_GELU = {"none": BY_NAME["gelu"], "tanh": BY_NAME["gelu_tanh"]}


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Act | None:
    return Act(int(Kind.HARDTANH), float(min_val), float(max_val)) if min_val <= max_val else None  # else an error


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Act | None:
    # in place, stock cannot tell what it was by what it is where the sign turns
    return None if inplace and negative_slope < 0 else Act(int(Kind.LEAKY_RELU), float(negative_slope))


def _gelu(approximate: str = "none") -> Act | None:
    return _GELU.get(approximate)


def _always(act: Act) -> Callable[..., Act]:
    return lambda inplace=False: act


# torch's class -> what reads it off a module
_OF_MODULE: dict[type, Callable[[Any], Act | None]] = {
    nn.ReLU: lambda _: RELU,
    nn.ReLU6: lambda m: _hardtanh(m.min_val, m.max_val),
    nn.Hardtanh: lambda m: _hardtanh(m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: _leaky_relu(m.negative_slope, m.inplace),
    nn.SiLU: lambda _: SILU,
    nn.Hardswish: lambda _: HARDSWISH,
    nn.GELU: lambda m: _gelu(m.approximate),
}
MODULES = tuple(_OF_MODULE)

# function, or a tensor's method by name -> what reads it off the arguments behind the tensor
_OF_CALL: dict[Any, Callable[..., Act | None]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _always(RELU)),
    F.relu6: _always(BY_NAME["relu6"]),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: lambda negative_slope=0.01: _leaky_relu(negative_slope, inplace=True),
    F.silu: _always(SILU),
    F.hardswish: _always(HARDSWISH),
    F.gelu: _gelu,
}
FUNCTIONS = tuple(name for name, function in vars(F).items() if callable(function) and function in _OF_CALL)  # of F

# of timm, which calls F.gelu
_OF_TIMM = {"GELU": _GELU["none"], "GELUTanh": _GELU["tanh"]}


def act_of_module(module: nn.Module) -> Act | None:
    """Return the activation that a module is, or None."""
    cls = type(module)
    if cls.__module__ == "timm.layers.activations" and cls.forward.__module__ == cls.__module__:
        return _OF_TIMM.get(cls.__name__)
    read = _OF_MODULE.get(layer_class(module))
    return None if read is None else read(module)


def act_of_call(target: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Act | None:
    """Return the activation that a function is, or a method by its name, with these arguments behind the tensor."""
    read = _OF_CALL.get(target)
    if read is None or not all(isinstance(a, (Real, str)) for a in (*arguments, *keywords.values())):
        return None
    try:
        return read(*arguments, **keywords)
    except TypeError:
        return None
