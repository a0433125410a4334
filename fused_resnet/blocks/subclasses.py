"""Classes that have another name than a layer of torch's and compute what that does."""

from torch import nn

_HELD_BY_LAYERS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"}
_BASES: dict[type, type] = {}
# what a class has by being one, or may have without another way to compute
_OF_ANY_CLASS = {
    *dir(type("", (), {})),
    "__init__",
    "__constants__",
    "__annotations__",
    "extra_repr",
    "reset_parameters",
}


def layer_class(module: nn.Module) -> type:
    """Return torch's class whose layer a module is: its own, or the base of a class that changes nothing of it."""
    cls = type(module)
    base = _BASES.get(cls)
    if base is None:
        of_torch = next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn.modules"))
        base = _BASES[cls] = of_torch if of_torch is not nn.Module and _changes_nothing(cls, of_torch) else cls
    return base if cls.forward is base.forward else cls  # type: ignore[attr-defined]


def _changes_nothing(cls: type, base: type) -> bool:
    """Whether a class, such as one that only has another ``__init__``, computes what a class of torch's does."""
    own = [vars(c) for c in cls.__mro__[: cls.__mro__.index(base)]]
    held = {*dir(base), *_HELD_BY_LAYERS}
    return not any(
        name in held - _OF_ANY_CLASS or isinstance(value, property) for names in own for name, value in names.items()
    )
