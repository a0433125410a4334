"""What a trace of a forward was seen to read, to hold and to be refused for."""

import functools
import os
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple, NoReturn

from torch import nn

from fused_resnet.blocks.guards import kind


class Unprovable(Exception):
    """A forward does what a trace cannot show."""


class Read(NamedTuple):
    """Something that steered a trace: what was read, from where, and a copy of what it was.

    ``names`` are attributes, from the module at ``path`` down; where ``path`` is None, the name of a module and of a
    global in it.
    """

    path: tuple[str, ...] | None
    names: tuple[str, ...]
    value: Any


def contents(value: Any) -> list[int]:
    """Return what a list, dict or set holds, by identity; of anything else, itself."""
    if isinstance(value, dict):
        return [id(item) for item in (*value, *value.values())]
    return [id(item) for item in (value if isinstance(value, (list, set)) else [value])]


def refill(container: Any, before: Any) -> None:
    """Put back into a list, dict or set what a copy of it holds."""
    container.clear()
    container.extend(before) if isinstance(container, list) else container.update(before)


def at(code: CodeType, line: int, what: str) -> str:
    """Return a reason that names file, line and function."""
    return f"{os.path.basename(code.co_filename)}:{line} ({code.co_name}) {what}"


class Ledger:
    """Reads and refusals of one trace, and the containers of the forward's own, to be put back.

    Attributes
    ----------
    refused
        Why the forward is; said to it by an exception, which it may have caught.
    asks_for_none
        Where a value is held against None.
    """

    def __init__(self) -> None:
        self.refused = ""
        self.asks_for_none = ""
        self._reads: list[tuple[nn.Module | None, tuple[str, ...], Any]] = []
        self._asked: list[tuple[Any, tuple[str, ...], Any]] = []  # read by name, of any module
        self._of_values: dict[str, tuple[CodeType, int]] = {}
        self._containers: dict[int, tuple[Any, Any, str]] = {}

    def refuse(self, code: CodeType, line: int, what: str) -> NoReturn:
        """Refuse the forward for what a function does in a line."""
        self._stop(at(code, line, what))

    def _stop(self, reason: str) -> NoReturn:
        self.refused = reason
        raise Unprovable(reason)

    def keep(self, value: Any, what: str) -> None:
        """Remember what is in a list, dict or set of the forward's, and in those inside it."""
        if isinstance(value, (list, dict, set)) and id(value) not in self._containers:
            self._containers[id(value)] = value, value.copy(), what
        if isinstance(value, (list, tuple)):
            for item in value:
                self.keep(item, what)
        elif isinstance(value, dict):
            for item in value.values():
                self.keep(item, what)

    def restore(self) -> list[str]:
        """Undo what the trace did to containers and name those that it changed."""
        changed = []
        for value, before, what in self._containers.values():
            if contents(value) != contents(before):
                changed.append(what)
                refill(value, before)
        return changed

    def reads(self, root: nn.Module, paths: dict[nn.Module, tuple[str, ...]]) -> Iterator[Read]:
        """Yield what steered the trace of a module; ``paths`` are those that it went through."""
        for owner, names, value in self._reads:
            if owner is None:
                yield Read(None, names, value)
            elif owner in paths and (kind(value) != "children" or (*paths[owner], *names) not in paths.values()):
                yield Read(paths[owner], names, value)
        inner = {module: name.split(".") for name, module in root.named_modules() if name} if self._asked else {}
        for owner, names, value in self._asked:
            if owner in paths:
                yield Read(paths[owner], names, value)
            elif owner in inner:
                yield Read((), (*inner[owner], *names), value)

    def strangers(self, root: nn.Module, paths: dict[nn.Module, tuple[str, ...]]) -> str:
        """Say where the trace went through a module that is none of ``paths``, or asked one that is not inside."""
        owners = {owner for owner, _, _ in self._reads} - {None, *paths}
        owners |= {owner for owner, _, _ in self._asked} - set(root.modules())
        return f"it runs a {type(owners.pop()).__name__} that is no child of its own" if owners else ""

    def hidden(self, root: nn.Module) -> str:
        """Say where a module inside holds something under a name that was read of what should be a value."""
        for module in root.modules():
            held = {*vars(module), *_class_constants(type(module))}  # type: ignore[arg-type]
            for name in self._of_values.keys() & held:
                code, line = self._of_values[name]
                return at(code, line, f"reads .{name}, which a {type(module).__name__} inside has, too")
        return ""


@functools.cache
def _class_constants(cls: type) -> frozenset[str]:
    """Return the names that a module's class holds something under that is no method or property."""
    classes = cls.__mro__[: cls.__mro__.index(nn.Module)]
    return frozenset(
        name
        for c in classes
        for name, value in vars(c).items()
        if not callable(value) and not hasattr(value, "__get__")
    )
