"""Classes that have another name than a layer of torch's and compute what that does."""

from types import FunctionType

import torch
from torch import nn

_HELD_BY_LAYERS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"}
_BASES: dict[type, type] = {}
# what a class has by being one, or may have without another way to compute
_OF_ANY_CLASS = {
    "__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__constants__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__",
    "extra_repr", "reset_parameters",
}  # fmt: skip


def layer_class(module: nn.Module) -> type:
    """Return torch's class whose layer a module is: its own, or the base of a class that changes nothing of it."""
    cls = type(module)
    if cls.__module__.startswith("torch.nn.modules"):
        return cls
    if not torch.compiler.is_compiling():  # which cannot look; a class may have changed since the last time
        of_torch = next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn.modules"))
        _BASES[cls] = of_torch if of_torch is not nn.Module and _changes_nothing(cls, of_torch) else cls
    return _BASES.get(cls, cls)


def _changes_nothing(cls: type, base: type) -> bool:
    """Whether a class, such as one that only has another ``__init__``, computes what a class of torch's does."""
    at = cls.__mro__.index(base)
    if cls.__mro__[at:] != base.__mro__:
        return False  # another class between the layer and nn.Module
    held = {*dir(base), *_HELD_BY_LAYERS}
    own = [(name, value) for c in cls.__mro__[:at] for name, value in vars(c).items() if name not in _OF_ANY_CLASS]
    return not any(
        name in held or (hasattr(value, "__get__") and not isinstance(value, (FunctionType, classmethod, staticmethod)))
        for name, value in own
    )
