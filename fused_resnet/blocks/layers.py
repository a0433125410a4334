"""Torch's layers that chains stand for, as they are and as a chain reads them."""

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.blocks.activations import FUNCTIONS as ACTIVATION_FUNCTIONS
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
    """Whether the layers that chains stand for compute what torch's do: nobody has replaced what they call."""
    return _AS_IT_WAS.holds() and (torch.compiler.is_compiling() or _CALLED_AS_THEY_WERE.holds())


class _Attributes:
    """Attributes of classes and modules, as they are when this is made."""

    def __init__(self, of: Iterable[tuple[Any, str]]):
        self.owners, self.names = zip(*of, strict=True)
        self.then = tuple(map(getattr, self.owners, self.names))

    def holds(self) -> bool:
        """Whether all are what they were."""
        return all(map(is_, map(getattr, self.owners, self.names), self.then))


_LAYERS = (*CONVOLUTIONS, *BATCH_NORMS, *ACTIVATIONS, nn.MaxPool2d, nn.Dropout, nn.Identity)
_FUNCTIONS = ("conv1d", "conv2d", "conv3d", "batch_norm", "max_pool2d", "dropout")
_AS_IT_WAS = _Attributes((
    *((layer, "forward") for layer in _LAYERS if layer is not nn.SyncBatchNorm),
    *((convolution, "_conv_forward") for convolution in CONVOLUTIONS),
    (nn.BatchNorm2d, "_check_input_dim"),
    (nn.Module, "__getattr__"),
    *((F, name) for name in (*_FUNCTIONS, *ACTIVATION_FUNCTIONS)),
    *((torch, name) for name in ("conv2d", "batch_norm", "relu")),
))  # fmt: skip
_CALLED_AS_THEY_WERE = _Attributes((layer, "__call__") for layer in _LAYERS)
