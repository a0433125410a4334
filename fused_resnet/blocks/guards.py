"""What steered the trace of a forward, held against what it is now."""

import enum
import sys
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from fused_resnet.blocks.layers import child, layers_are_stock
from fused_resnet.blocks.mixin import own_class
from fused_resnet.blocks.plan import Container, Plan, body_of
from fused_resnet.blocks.refusals import why_not_plain

IMMUTABLE = (
    bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device, torch.layout,
    torch.memory_format, FunctionType, BuiltinFunctionType, slice, range, frozenset,
)  # fmt: skip
TENSOR, ABSENT = "a tensor", "no such attribute"


def own_name(module: nn.Module) -> tuple[str, str]:
    """Return what a class is known by; fused, it keeps that."""
    return type(module).__module__, type(module).__qualname__


def kind(value: Any) -> str:
    """Return what a read of a module is of, its "children" or its "class", or nothing for any other read."""
    return value[0] if isinstance(value, tuple) and value[:1] in (("children",), ("class",)) else ""


def frozen(value: Any) -> Any:
    """Return a value, or a copy of a container of values, that can be compared later; TypeError for any other."""
    if isinstance(value, IMMUTABLE):
        return value
    if type(value) in (list, tuple, torch.Size):
        return (type(value).__name__, *[frozen(item) for item in value])
    if isinstance(value, dict):
        return ("dict", *[(frozen(key), frozen(item)) for key, item in value.items()])
    if type(value) is set:
        return ("set", frozenset(map(frozen, value)))
    raise TypeError


def same(value: Any, kept: Any) -> bool:
    """Whether a value is still what :func:`frozen` made a copy of; in what ``torch.compile`` can follow."""
    if isinstance(value, nn.Module):
        if type(kept) is tuple and kept[0] == "class":
            return bool(own_name(value) == kept[1])
        return bool(type(kept) is tuple and kept == ("children", *value._modules))
    if isinstance(value, torch.Tensor):
        return bool(kept == TENSOR)
    if isinstance(value, MethodType):
        return value.__func__ is kept
    if isinstance(value, (list, tuple)):
        if type(kept) is not tuple or len(kept) != len(value) + 1 or kept[0] != type(value).__name__:
            return False
        return all([same(item, of) for item, of in zip(value, kept[1:], strict=True)])  # noqa: C419 (Dynamo)
    if isinstance(value, dict):
        if type(kept) is not tuple or len(kept) != len(value) + 1 or kept[0] != "dict":
            return False
        return all([same(k, of[0]) and same(v, of[1]) for (k, v), of in zip(value.items(), kept[1:], strict=True)])  # noqa: C419
    if isinstance(value, set):
        return bool(kept == ("set", frozenset(value)))
    return value is kept or (type(value) is type(kept) and bool(value == kept))


def why_not_world(plan: Plan) -> str | None:
    """Return what has changed, outside of its modules, of what a plan relies on."""
    # torch.export, which puts functions of its own in their place, sees what it traces
    if not (torch.compiler.is_compiling() and torch.compiler.is_exporting()) and not layers_are_stock():
        return "a forward of torch's own layers, or a function that it calls, has been replaced"
    for container, forward in zip(plan.containers, plan.forwards, strict=True):
        if container.cls.forward is not forward:
            return f"{container.cls.__name__}.forward has changed since it was fused"
    for (of_module, name), value in plan.globals:
        if not same(sys.modules[of_module].__dict__.get(name), value):
            return f"the global {name} of {of_module} has changed since it was fused"
    for function, *body in plan.functions:
        if tuple(body) != body_of(function):
            return f"{function.__qualname__} has changed since it was fused"
    return None


def why_not_as_traced(module: nn.Module, container: Container) -> str | None:
    """Return in what a module is another than the one that was traced, or None."""
    name = ".".join(container.path) or "the module"
    inner = child(module, container.path)
    if container.path and own_class(inner) is not container.cls:
        return f"{name} is a {own_class(inner).__name__}, was a {container.cls.__name__} when it was fused"
    if container.path and (reason := why_not_plain(inner, container.path)):
        return reason
    if tuple(inner._modules) != container.children:
        return f"{name} has other children than when it was fused"
    for child_name in container.children:
        if (getattr(inner, child_name) is None) != (child_name in container.missing):
            return f"{name}.{child_name} has changed since it was fused"
    return why_not_read(module, container)


def why_not_read(module: nn.Module, container: Container) -> str | None:
    """Return what is no longer what the trace read there, or None."""
    for names, value in container.attributes:
        now: Any = child(module, container.path)
        for attribute in names:
            now = getattr(now, attribute, ABSENT)
        if not same(now, value):
            return f"{'.'.join(container.path) or 'the module'}.{'.'.join(names)} has changed since it was fused"
    return None
