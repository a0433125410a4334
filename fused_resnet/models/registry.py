"""Networks by their names: this package's own, torchvision's and timm's."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

from torch import nn

from fused_resnet.models.weights import load_weights

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Entry:
    """A network of the registry.

    Attributes
    ----------
    constructor
        Makes it.
    image_size
        Height and width of the images that it is made for.
    """

    constructor: Callable[..., nn.Module]
    image_size: int


REGISTRY: dict[str, Entry] = {}


def registered(image_size: int) -> Callable[[Callable[..., Model]], Callable[..., Model]]:
    """Return a decorator that adds a constructor to the registry, and to the constructor the option ``weights``."""

    def register(constructor: Callable[..., Model]) -> Callable[..., Model]:
        name = constructor.__name__

        @functools.wraps(constructor)
        def construct(*, weights: str | PathLike[str] | None = None, **kwargs: Any) -> Model:
            model = constructor(**kwargs)
            if weights is not None:
                load_weights(model, name, weights)
            return model

        REGISTRY[name] = Entry(construct, image_size)
        return construct

    return register


def names() -> list[str]:
    """Return the name of every model that `create` knows."""
    return list(REGISTRY)


def create(name: str, **kwargs: Any) -> nn.Module:
    """Make a model by its name.

    Parameters
    ----------
    name : str
        One of `names`, or ``"torchvision:NAME"`` or ``"timm:NAME"`` for one of theirs.
    **kwargs
        Passed to the model: what `ResNet` or `VGG` takes. All of ours take ``weights``, too: a checkpoint's path, or
        the name of torchvision's weights (``"IMAGENET1K_V2"``, ``"DEFAULT"``); see `load_weights`.

    Raises
    ------
    ValueError
        No model has that name, an option is none of its values, or the weights do not fit.
    FileNotFoundError
        ``weights`` is neither a file nor the name of torchvision's weights.
    ImportError
        The package that it is to come from is not installed.
    """
    package, separator, model = name.partition(":")
    if separator:
        return _create_from(package, model, **kwargs)
    if name not in REGISTRY:
        known = ", ".join(names())
        raise ValueError(f"model must be one of {known}, or torchvision:NAME or timm:NAME; got {name!r}")
    return REGISTRY[name].constructor(**kwargs)


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
