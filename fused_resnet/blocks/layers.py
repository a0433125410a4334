"""Torch's layers that chains stand for, as they are and as a chain reads them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.blocks.activations import MODULES as ACTIVATIONS
from fused_resnet.blocks.plan import Path

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# timm's, a norm and its activation under one name: a batch norm, the synchronised and the frozen one
NORM_ACTS = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
FROZEN_NORMS = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")


def child(module: nn.Module, path: Path) -> Any:
    """Return the descendant of ``module`` at ``path``."""
    for name in path:
        module = getattr(module, name)
    return module


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Read a geometry as torch's layers do: ``n`` means ``(n, n)``."""
    first, second = (value, value) if isinstance(value, int) else value
    return _static(first), _static(second)


def _static(n: int) -> int:
    """Return ``n``; makes ``torch.compile(dynamic=True)`` take it as the constant that it is, not as a symbol."""
    return len((None,) * n)


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether a module is torchvision's frozen batch norm, or timm's, recognised without importing either."""
    return type(norm).__name__ in FROZEN_NORMS


def is_norm_act(norm: nn.Module) -> bool:
    """Whether a module is timm's norm with an activation, and a dropout in between, recognised without importing it."""
    return type(norm).__name__ in NORM_ACTS and type(norm).__module__ == "timm.layers.norm_act"


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether a module is a batch norm that a chain can hold."""
    return type(norm) in BATCH_NORMS or is_frozen_norm(norm) or is_norm_act(norm)


def is_inert(module: nn.Module) -> bool:
    """Whether a module gives what it is given: nn.Identity, or a dropout that drops nothing."""
    return type(module) is nn.Identity or (
        type(module) in (nn.Dropout, nn.Dropout2d) and (module.p == 0 or not module.training)
    )


def layers_are_stock() -> bool:
    """Whether the layers that chains stand for compute what torch's do: nobody has replaced their forward."""
    return (
        nn.Conv2d.forward is _CONV2D
        and nn.Conv2d._conv_forward is _CONV_FORWARD
        and nn.BatchNorm2d.forward is _BATCH_NORM
        and nn.ReLU.forward is _RELU
        and nn.MaxPool2d.forward is _MAX_POOL
        and F.conv2d is _F_CONV2D
        and F.batch_norm is _F_BATCH_NORM
        and F.relu is _F_RELU
        and F.max_pool2d is _F_MAX_POOL
        and (torch.compiler.is_compiling() or _is_called_as_stock())
        and nn.Module.__getattr__ is _GETATTR
        and nn.BatchNorm2d._check_input_dim is _CHECK_INPUT_DIM
        and torch.conv2d is _TORCH_CONV2D
        and torch.batch_norm is _TORCH_BATCH_NORM
        and torch.relu is _TORCH_RELU
        and _activations_are_stock()
    )


def _activations_are_stock() -> bool:
    """Whether the activations besides ReLU are torch's own."""
    return (
        nn.Hardtanh.forward is _HARDTANH
        and nn.ReLU6.forward is _HARDTANH
        and nn.LeakyReLU.forward is _LEAKY_RELU
        and nn.SiLU.forward is _SILU
        and nn.Hardswish.forward is _HARDSWISH
        and nn.GELU.forward is _GELU
        and F.hardtanh is _F_HARDTANH
        and F.relu6 is _F_RELU6
        and F.leaky_relu is _F_LEAKY_RELU
        and F.silu is _F_SILU
        and F.hardswish is _F_HARDSWISH
        and F.gelu is _F_GELU
    )


def _is_called_as_stock() -> bool:
    return all([cls.__call__ is _CALL for cls in _CALLED])  # a list: a third of a generator's time


_CALLED = (nn.Conv2d, nn.BatchNorm2d, *ACTIVATIONS)
_CONV2D, _CONV_FORWARD, _BATCH_NORM = nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.BatchNorm2d.forward
_RELU, _MAX_POOL = nn.ReLU.forward, nn.MaxPool2d.forward
_HARDTANH, _LEAKY_RELU, _SILU = nn.Hardtanh.forward, nn.LeakyReLU.forward, nn.SiLU.forward
_HARDSWISH, _GELU = nn.Hardswish.forward, nn.GELU.forward
_CALL, _GETATTR, _CHECK_INPUT_DIM = nn.Module.__call__, nn.Module.__getattr__, nn.BatchNorm2d._check_input_dim
_TORCH_CONV2D, _TORCH_BATCH_NORM, _TORCH_RELU = torch.conv2d, torch.batch_norm, torch.relu
_F_CONV2D, _F_BATCH_NORM, _F_RELU, _F_MAX_POOL = F.conv2d, F.batch_norm, F.relu, F.max_pool2d
_F_HARDTANH, _F_RELU6, _F_LEAKY_RELU = F.hardtanh, F.relu6, F.leaky_relu
_F_SILU, _F_HARDSWISH, _F_GELU = F.silu, F.hardswish, F.gelu
