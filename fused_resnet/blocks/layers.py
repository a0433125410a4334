"""Torch's layers that chains stand for, as they are and as a chain reads them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.blocks.activations import MODULES as ACTIVATIONS
from fused_resnet.blocks.frozen import is_frozen_norm
from fused_resnet.blocks.plan import Path
from fused_resnet.blocks.subclasses import layer_class

CONVOLUTIONS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}  # and their spatial dimensions
BATCH_NORMS: dict[type, int | None] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}
# timm's, a norm and its activation under one name: a batch norm, the synchronised and the frozen one
NORM_ACTS = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")


def child(module: nn.Module, path: Path) -> Any:
    """Return the descendant of ``module`` at ``path``."""
    for name in path:
        module = getattr(module, name)
    return module


def sizes(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Read a geometry as torch's layers do: ``n`` means ``n`` along each of the spatial dimensions."""
    return tuple([_static(n) for n in ([value] * dims if isinstance(value, int) else value)])


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Read a geometry of two dimensions."""
    rows, columns = sizes(value, 2)
    return rows, columns


def _static(n: int) -> int:
    """Return ``n``; makes ``torch.compile(dynamic=True)`` take it as the constant that it is, not as a symbol."""
    return len((None,) * n)


def padding_of(conv: Any, dims: int) -> tuple[int, ...] | None:
    """Return how many zeros a convolution puts on both sides, or None where it is not as many on either."""
    if conv.padding == "valid":
        return sizes(0, dims)
    if conv.padding != "same":
        return sizes(conv.padding, dims)
    if any(n != 1 for n in sizes(conv.stride, dims)):
        return None  # an error of stock's
    both = [d * (n - 1) for n, d in zip(sizes(conv.kernel_size, dims), sizes(conv.dilation, dims), strict=True)]
    return None if any(n % 2 for n in both) else tuple([n // 2 for n in both])


def is_norm_act(norm: nn.Module) -> bool:
    """Whether a module is timm's norm with an activation, and a dropout in between, recognised without importing it."""
    cls = type(norm)
    # its forward is the one that it came with
    return cls.__name__ in NORM_ACTS and cls.__module__ == cls.forward.__module__ == "timm.layers.norm_act"


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether a module is a batch norm that a chain can hold."""
    return layer_class(norm) in BATCH_NORMS or is_frozen_norm(norm) or is_norm_act(norm)


def norm_dims(norm: nn.Module) -> list[int]:
    """Return the spatial dimensions that a batch norm asks for, or nothing where it takes any."""
    dims = BATCH_NORMS.get(layer_class(norm), 2)
    return [] if dims is None or isinstance(norm, nn.SyncBatchNorm) else [dims]


def is_inert(module: nn.Module) -> bool:
    """Whether a module gives what it is given: nn.Identity, or a dropout that drops nothing."""
    if type(module) is nn.Dropout:
        return bool(module.p == 0 or (0 <= module.p <= 1 and not module.training))
    return type(module) is nn.Identity


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
        and _sequences_and_volumes_are_stock()
    )


def _activations_are_stock() -> bool:
    """Whether the activations besides ReLU, and what may be left out between them and a norm, are torch's own."""
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
        and F.relu_ is _F_RELU_
        and F.leaky_relu_ is _F_LEAKY_RELU_
        and F.hardtanh_ is _F_HARDTANH_
        and nn.Dropout.forward is _DROPOUT
        and nn.Identity.forward is _IDENTITY
        and F.dropout is _F_DROPOUT
    )


def _sequences_and_volumes_are_stock() -> bool:
    """Whether the convolutions and norms over them are torch's own."""
    return (
        nn.Conv1d.forward is _CONV1D
        and nn.Conv1d._conv_forward is _CONV1D_FORWARD
        and nn.Conv3d.forward is _CONV3D
        and nn.Conv3d._conv_forward is _CONV3D_FORWARD
        and nn.BatchNorm1d.forward is _BATCH_NORM
        and nn.BatchNorm3d.forward is _BATCH_NORM
        and F.conv1d is _F_CONV1D
        and F.conv3d is _F_CONV3D
    )


def _is_called_as_stock() -> bool:
    return all([cls.__call__ is _CALL for cls in _CALLED])  # noqa: C419 (half the time)


_CALLED = (*CONVOLUTIONS, *BATCH_NORMS, *ACTIVATIONS, nn.Dropout, nn.Identity, nn.MaxPool2d)
_CONV2D, _CONV_FORWARD, _BATCH_NORM = nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.BatchNorm2d.forward
_CONV1D, _CONV1D_FORWARD, _F_CONV1D = nn.Conv1d.forward, nn.Conv1d._conv_forward, F.conv1d
_CONV3D, _CONV3D_FORWARD, _F_CONV3D = nn.Conv3d.forward, nn.Conv3d._conv_forward, F.conv3d
_RELU, _MAX_POOL = nn.ReLU.forward, nn.MaxPool2d.forward
_HARDTANH, _LEAKY_RELU, _SILU = nn.Hardtanh.forward, nn.LeakyReLU.forward, nn.SiLU.forward
_HARDSWISH, _GELU = nn.Hardswish.forward, nn.GELU.forward
_CALL, _GETATTR, _CHECK_INPUT_DIM = nn.Module.__call__, nn.Module.__getattr__, nn.BatchNorm2d._check_input_dim
_TORCH_CONV2D, _TORCH_BATCH_NORM, _TORCH_RELU = torch.conv2d, torch.batch_norm, torch.relu
_F_CONV2D, _F_BATCH_NORM, _F_RELU, _F_MAX_POOL = F.conv2d, F.batch_norm, F.relu, F.max_pool2d
_F_HARDTANH, _F_RELU6, _F_LEAKY_RELU = F.hardtanh, F.relu6, F.leaky_relu
_F_SILU, _F_HARDSWISH, _F_GELU = F.silu, F.hardswish, F.gelu
_F_RELU_, _F_LEAKY_RELU_, _F_HARDTANH_ = F.relu_, F.leaky_relu_, F.hardtanh_
_DROPOUT, _IDENTITY, _F_DROPOUT = nn.Dropout.forward, nn.Identity.forward, F.dropout
