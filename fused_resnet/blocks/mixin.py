"""What marks a fused module: a mixin in front of its own class."""

from torch import nn


class FusedModule(nn.Module):
    """The mixin in front of a module's own class; its ``_fused`` is a :class:`Fusion`."""

    def extra_repr(self) -> str:
        """Say so where the model is printed."""
        return ", ".join(filter(None, (super().extra_repr(), "fused")))


def stock_class(cls: type) -> type:
    """Return the class that :func:`fused_class` was given."""
    return cls.__mro__[cls.__mro__.index(FusedModule) + 1]


def own_class(module: nn.Module) -> type:
    """Return a module's own class, fused or not."""
    return stock_class(type(module)) if isinstance(module, FusedModule) else type(module)
