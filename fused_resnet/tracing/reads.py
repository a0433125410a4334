"""What a function reads besides its arguments: globals, and attributes of a module."""

import builtins
import enum
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from fused_resnet.blocks.guards import ABSENT, IMMUTABLE, TENSOR, frozen
from fused_resnet.tracing.code import Code
from fused_resnet.tracing.ledger import Ledger
from fused_resnet.tracing.trust import looks_up_like_transformers

BUILTINS = frozenset((
    "isinstance", "issubclass", "len", "range", "zip", "enumerate", "list", "tuple", "dict", "set", "reversed", "int",
    "float", "bool", "str", "max", "min", "sum", "sorted", "super", "slice", "map", "filter", "any", "all", "abs",
    "getattr", "hasattr", "round", "callable", "divmod", "pow", "NotImplemented", "Ellipsis",
))  # fmt: skip
# what answers by a mode, which no guard here looks at, sets one, or makes what a trace takes for another
ASKS_A_MODE = frozenset((
    "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled",
    "is_autocast_available", "get_autocast_dtype", "get_autocast_gpu_dtype", "get_default_dtype", "is_inference",
    "get_default_device", "environ", "getenv", "set_grad_enabled", "set_default_dtype", "Parameter", "Buffer",
    "get_num_threads", "are_deterministic_algorithms_enabled", "attrgetter", "_C", "is_", "is_not", "is_tensor",
    "has_torch_function", "has_torch_function_unary", "has_torch_function_variadic", "handle_torch_function",
))  # fmt: skip
CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format, type, type(None))
PURE_MODULES = ("torch", "math", "operator", "typing", "collections", "functools", "itertools", "builtins")
UNKNOWN = object()  # what nothing is the same as: where it is refused, another module may not be
Found = Iterator[tuple[nn.Module | None, tuple[str, ...], Any]]


def globals_read(ledger: Ledger, code: CodeType, held: Code, names: dict[str, Any]) -> Found:
    """Yield the globals and builtins that a function reads; ``names`` are those of its module."""
    module = str(names.get("__name__"))
    if held.names and getattr(sys.modules.get(module), "__dict__", None) is not names:
        ledger.refuse(code, code.co_firstlineno, f"reads globals of {module}, which is no module that can be imported")
    for name, chain, line in held.names:
        if name not in names:
            built_in = getattr(builtins, name, None)
            if name not in BUILTINS and not (isinstance(built_in, type) and issubclass(built_in, BaseException)):
                ledger.refuse(code, line, f"calls {name}")
            yield None, (module, name), None
            continue
        value = names[name]
        if asked := ASKS_A_MODE.intersection((name, *chain)):
            ledger.refuse(code, line, f"asks {min(asked)}, which may change from call to call")
        if isinstance(value, ModuleType):
            root = value.__name__.partition(".")[0]
            if root not in PURE_MODULES or not _is_constant(value, chain):
                ledger.refuse(code, line, f"reads the module {value.__name__}")
            yield None, (module, name), value
        elif isinstance(value, type):
            of_class = getattr(value, chain[0], None) if chain else None
            is_constant = callable(of_class) or isinstance(of_class, enum.Enum) or value.__module__.startswith("torch")
            if chain and not is_constant:
                ledger.refuse(code, line, f"reads {name}.{chain[0]}, an attribute of a class")
            yield None, (module, name), value
        elif isinstance(value, (FunctionType, BuiltinFunctionType)):
            if value.__module__ == "builtins":
                ledger.refuse(code, line, f"calls {name}, which is {value.__name__}")
            if chain:
                ledger.refuse(code, line, f"reads {name}.{chain[0]}, an attribute of a function")
            yield None, (module, name), value
        elif type(value).__module__.partition(".")[0] not in ("torch", "typing"):
            ledger.keep(value, f"the global {name}")
            yield None, (module, name), _kept(ledger, code, line, value, f"the global {name}")


def _is_constant(module: ModuleType, chain: tuple[str, ...]) -> bool:
    """Whether what is read of a module of functions is one, or a constant."""
    value: Any = module
    for name in chain:
        if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
            return True
        value = getattr(value, name, None)
    if module.__name__ == "math" and chain[0] in ("pi", "e", "tau", "inf", "nan"):
        return True
    return callable(value) or isinstance(value, (*CONSTANTS, ModuleType))


def attributes_read(
    ledger: Ledger, code: CodeType, owner: nn.Module, chain: tuple[str, ...], by_name: bool = False
) -> Found:
    """Yield what ``self.a.b`` reads."""
    value: Any = owner
    line = code.co_firstlineno
    for i, name in enumerate(chain):
        so_far = chain[: i + 1]
        what = f"self.{'.'.join(so_far)}"
        if name in ("__dict__", "__class__", "_buffers", "_parameters", "_modules"):
            ledger.refuse(code, line, f"reads {what}")
        if isinstance(value, nn.Module) and isinstance(getattr(type(value), name, None), property):
            return  # its function is watched like any other
        value = _get(value, name) if isinstance(value, nn.Module) else getattr(value, name)
        if isinstance(value, nn.Module):
            if isinstance(value, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                yield owner, so_far, ("children", *value._modules)
            continue
        if isinstance(value, torch.Tensor):
            if name in vars(owner) and not isinstance(value, nn.Parameter):
                yield owner, so_far, UNKNOWN
                ledger.refuse(code, line, f"reads {what}, a tensor that is no buffer")
            yield owner, so_far, TENSOR
        elif isinstance(value, MethodType):
            inherited = getattr(nn.Module, name, None) is value.__func__
            if type(value.__self__).__name__ == "FloatFunctional":
                return  # torch's add and ReLU as methods of a module
            if (i or inherited) and name not in ("children", "named_children", "get_submodule"):
                yield owner, so_far, UNKNOWN
                ledger.refuse(code, line, f"calls {what}, a method that a trace does not enter")
            yield owner, so_far, value.__func__
        elif i + 1 < len(chain) and _is_plain(value, chain[i + 1]):
            continue
        elif value is _MISSING:
            if by_name:  # it may appear
                yield owner, so_far, ABSENT
        else:
            ledger.keep(value, what)
            yield owner, so_far, UNKNOWN
            yield owner, so_far, _kept(ledger, code, line, value, what)
        return


_MISSING = object()


def _is_plain(value: Any, name: str) -> bool:
    """Whether reading an attribute of an object, such as a configuration, runs no code and gives what it holds."""
    if isinstance(value, (*IMMUTABLE, ModuleType, list, dict, set, tuple)):
        return False
    cls = type(value)
    own_access = [c for c in cls.__mro__[:-1] if "__getattribute__" in vars(c) or "__getattr__" in vars(c)]
    known = all(looks_up_like_transformers("__getattribute__", c.__module__) for c in own_access)
    if own_access and not (known and name in vars(value)):
        return False
    held = getattr(cls, name, None)
    return hasattr(value, name) and not callable(held) and not isinstance(held, property)


def _get(module: nn.Module, name: str) -> Any:
    """Read an attribute past the tracer, which has put itself in the place of ``nn.Module.__getattr__``."""
    for held in (vars(module), module._parameters, module._buffers, module._modules):
        if name in held:
            return held[name]
    try:
        return object.__getattribute__(module, name)
    except AttributeError:
        return _MISSING


def _kept(ledger: Ledger, code: CodeType, line: int, value: Any, what: str) -> Any:
    try:
        return frozen(value)
    except TypeError:
        ledger.refuse(code, line, f"reads {what}, a {type(value).__name__}, which may change unseen")


def refuse_own_access(ledger: Ledger, code: CodeType, line: int, module: nn.Module) -> None:
    """Refuse a module whose attributes are looked up by code of its own."""
    if type(module).__getattr__ is not nn.Module.__getattr__:  # the tracer's, while it runs
        ledger.refuse(code, line, f"reads a {type(module).__name__}, which has a __getattr__")
    if type(module).__getattribute__ is not object.__getattribute__:
        ledger.refuse(code, line, f"reads a {type(module).__name__}, which has a __getattribute__")
