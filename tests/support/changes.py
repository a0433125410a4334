"""Changes of a module that a fused model has to honour."""

from torch import nn


def double_forward(module: nn.Module) -> None:
    """Give a module a forward of its own, whatever its class's does."""
    own = module.forward
    module.forward = lambda x: own(x) * 2
