"""Tell in a few microseconds that modules are what they were, so that what was read of them need not be read again."""

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from torch import nn

HELD = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot(NamedTuple):
    """Modules as they were: equal attributes, the same parameters, buffers, children and classes, and no hooks.

    Of a list that changes in place, or a tensor that is neither parameter nor buffer, it knows nothing.
    """

    modules: tuple[nn.Module, ...]
    attributes: list[dict[str, Any]]
    attributes_then: list[dict[str, Any]]
    held: tuple[dict[str, Any], ...]
    names_then: list[tuple[str, ...]]
    values_then: tuple[Any, ...]
    classes_then: tuple[type, ...]  # of the modules, and of what they hold
    hooks: tuple[dict[Any, Any], ...]

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> "Snapshot":
        """Take one of modules without hooks."""
        modules = tuple(modules)
        attributes = [vars(module) for module in modules]
        held = tuple(own[name] for own in attributes for name in HELD)
        hooks = tuple(own[name] for own in attributes for name in HOOKS)
        values = tuple(chain.from_iterable(map(dict.values, held)))
        then = [dict(own) for own in attributes]
        return cls(modules, attributes, then, held, [*map(tuple, held)], values, (*map(type, modules + values),), hooks)

    def holds(self) -> bool:
        """Whether all is as it was."""
        try:
            return (
                self.attributes == self.attributes_then
                and [*map(tuple, self.held)] == self.names_then
                and all(map(is_, chain.from_iterable(map(dict.values, self.held)), self.values_then))
                and all(map(is_, map(type, chain(self.modules, self.values_then)), self.classes_then))
                and not any(self.hooks)
            )
        except Exception:  # of an attribute that cannot be compared
            return False
