"""The networks of the residual-learning paper, by name.

``models.resnet50()`` and ``models.create("resnet50")`` are the same; `names` lists what there is. The ImageNet family
(18, 34, 50, 101, 152) holds torchvision's parameters under torchvision's names; the CIFAR family (20, 32, 44, 56, 110,
1202) is that of the paper's section 4.2, where ``shortcut="A"`` gives the paper's shortcuts, without parameters. Their
plain twins (``plain34``, ``plain56``, ...) are the same layers without shortcuts.
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from fused_resnet.models.resnet import BasicBlock, Bottleneck, ResNet, ZeroPadded

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "ZeroPadded",
    "create",
    "names",
    "plain18",
    "plain20",
    "plain32",
    "plain34",
    "plain44",
    "plain56",
    "plain110",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
]

_REGISTRY: dict[str, Callable[..., ResNet]] = {}


def _register(constructor: Callable[..., ResNet]) -> Callable[..., ResNet]:
    _REGISTRY[constructor.__name__] = constructor
    return constructor


def names() -> list[str]:
    """Return the name of every model that `create` knows."""
    return list(_REGISTRY)


def create(name: str, **kwargs: Any) -> nn.Module:
    """Make a model by its name.

    Parameters
    ----------
    name : str
        One of `names`, or ``"torchvision:NAME"`` or ``"timm:NAME"`` for one of theirs.
    **kwargs
        Passed to the model: ``num_classes``, ``in_channels``, ``zero_init_residual``, ``shortcut``.

    Raises
    ------
    ValueError
        No model has that name.
    ImportError
        The package that it is to come from is not installed.
    """
    package, separator, model = name.partition(":")
    if separator:
        return _create_from(package, model, **kwargs)
    if name not in _REGISTRY:
        known = ", ".join(names())
        raise ValueError(f"model must be one of {known}, or torchvision:NAME or timm:NAME; got {name!r}")
    return _REGISTRY[name](**kwargs)


def _create_from(package: str, name: str, **kwargs: Any) -> nn.Module:
    constructors = {"torchvision": ("torchvision.models", "get_model"), "timm": ("timm", "create_model")}
    if package not in constructors:
        raise ValueError(f"a model comes from {' or '.join(constructors)}; got {package}:{name}")
    module, function = constructors[package]
    try:
        constructor = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ImportError(f"{package}:{name} needs {package}; mend: pip install {package}") from error
    try:
        model: nn.Module = constructor(name, **kwargs)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{package} has no model {name!r}: {error}") from error
    return model


@_register
def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18 of table 1, for 224x224 images."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


@_register
def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34 of table 1, for 224x224 images."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


@_register
def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50 v1.5 of table 1, for 224x224 images."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **kwargs)


@_register
def resnet101(**kwargs: Any) -> ResNet:
    """ResNet-101 v1.5 of table 1, for 224x224 images."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **kwargs)


@_register
def resnet152(**kwargs: Any) -> ResNet:
    """ResNet-152 v1.5 of table 1, for 224x224 images."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **kwargs)


@_register
def plain18(**kwargs: Any) -> ResNet:
    """ResNet-18's layers without its shortcuts (figure 4, left)."""
    return resnet18(shortcut="none", **kwargs)


@_register
def plain34(**kwargs: Any) -> ResNet:
    """ResNet-34's layers without its shortcuts (figure 3, middle)."""
    return resnet34(shortcut="none", **kwargs)


def _cifar(depth: int, *, num_classes: int = 10, **kwargs: Any) -> ResNet:
    """Section 4.2: a 3x3 stem and three stages of n basic blocks, 6n + 2 weighted layers in all.

    The paper's have ``shortcut="A"``; the default is ``"B"``, whose projections are trained, too.
    """
    blocks, remainder = divmod(depth - 2, 6)
    assert remainder == 0, f"a CIFAR ResNet has 6n + 2 layers, not {depth}"
    return ResNet(BasicBlock, (blocks,) * 3, widths=(16, 32, 64), small_images=True, num_classes=num_classes, **kwargs)


@_register
def resnet20(**kwargs: Any) -> ResNet:
    """ResNet-20 of section 4.2, for 32x32 images."""
    return _cifar(20, **kwargs)


@_register
def resnet32(**kwargs: Any) -> ResNet:
    """ResNet-32 of section 4.2, for 32x32 images."""
    return _cifar(32, **kwargs)


@_register
def resnet44(**kwargs: Any) -> ResNet:
    """ResNet-44 of section 4.2, for 32x32 images."""
    return _cifar(44, **kwargs)


@_register
def resnet56(**kwargs: Any) -> ResNet:
    """ResNet-56 of section 4.2, for 32x32 images."""
    return _cifar(56, **kwargs)


@_register
def resnet110(**kwargs: Any) -> ResNet:
    """ResNet-110 of section 4.2, for 32x32 images."""
    return _cifar(110, **kwargs)


@_register
def resnet1202(**kwargs: Any) -> ResNet:
    """ResNet-1202 of section 4.2, for 32x32 images."""
    return _cifar(1202, **kwargs)


@_register
def plain20(**kwargs: Any) -> ResNet:
    """ResNet-20's layers without its shortcuts (figure 6, left)."""
    return resnet20(shortcut="none", **kwargs)


@_register
def plain32(**kwargs: Any) -> ResNet:
    """ResNet-32's layers without its shortcuts (figure 6, left)."""
    return resnet32(shortcut="none", **kwargs)


@_register
def plain44(**kwargs: Any) -> ResNet:
    """ResNet-44's layers without its shortcuts (figure 6, left)."""
    return resnet44(shortcut="none", **kwargs)


@_register
def plain56(**kwargs: Any) -> ResNet:
    """ResNet-56's layers without its shortcuts (figure 6, left)."""
    return resnet56(shortcut="none", **kwargs)


@_register
def plain110(**kwargs: Any) -> ResNet:
    """ResNet-110's layers without its shortcuts (figure 6, left)."""
    return resnet110(shortcut="none", **kwargs)
