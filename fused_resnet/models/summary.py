"""What a network of the registry costs: depth, parameters, multiply-adds."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.models.registry import REGISTRY, create


@dataclass(frozen=True)
class Summary:
    """A network in one row.

    Attributes
    ----------
    name
        In the registry.
    depth
        Weighted layers, as the paper counts them: without those of shortcuts.
    parameters
        How many are trained.
    multiply_adds
        Of the forward of one image, in convolutions and linear layers: what table 1 calls FLOPs.
    image_size
        Height and width of that image.
    shortcut
        One of section 3.3's options, or ``"none"``.
    """

    name: str
    depth: int
    parameters: int
    multiply_adds: int
    image_size: int
    shortcut: str


def summarize(name: str, **kwargs: Any) -> Summary:
    """Count a network of the registry, made with these options; no memory is taken and nothing is computed."""
    with torch.device("meta"):
        model = create(name, **kwargs).eval()
        size = REGISTRY[name].image_size
        image = torch.empty(1, kwargs.get("in_channels", 3), size, size)
    depth = multiply_adds = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal multiply_adds
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        multiply_adds += output.numel() * layer.weight[0].numel()

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
            depth += "downsample" not in path
    model(image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Summary(name, depth, parameters, multiply_adds, size, getattr(model, "shortcut", "none"))
