"""Torch's layers that chains stand for, as they are and as a chain reads them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.blocks.plan import Path

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


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
    """Whether a module is torchvision's frozen batch norm, recognised without importing torchvision."""
    return type(norm).__name__ == "FrozenBatchNorm2d"


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
    )


def _is_called_as_stock() -> bool:
    return nn.Conv2d.__call__ is _CALL and nn.BatchNorm2d.__call__ is _CALL and nn.ReLU.__call__ is _CALL


_CONV2D, _CONV_FORWARD, _BATCH_NORM = nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.BatchNorm2d.forward
_RELU, _MAX_POOL = nn.ReLU.forward, nn.MaxPool2d.forward
_CALL, _GETATTR, _CHECK_INPUT_DIM = nn.Module.__call__, nn.Module.__getattr__, nn.BatchNorm2d._check_input_dim
_TORCH_CONV2D, _TORCH_BATCH_NORM, _TORCH_RELU = torch.conv2d, torch.batch_norm, torch.relu
_F_CONV2D, _F_BATCH_NORM, _F_RELU, _F_MAX_POOL = F.conv2d, F.batch_norm, F.relu, F.max_pool2d
