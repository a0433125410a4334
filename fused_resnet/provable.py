"""What a trace of a forward cannot show, read off the code of every function that it runs.

``torch.fx`` records what happens to tensors, and nothing else: a ``with`` block, a store, a print are lost, and what
else steers a forward is frozen.  So every Python function that a trace enters is watched, and its code is read: what it
may not hold refuses the forward, with file and line; what it reads besides tensors becomes a guard (:class:`Read`).
Torch's own Python is trusted, but for the files that change how torch runs (:data:`MODES`).
"""

import builtins
import dis
import enum
import functools
import gc
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx, nn

TORCH = os.path.dirname(torch.__file__) + os.sep
PYTHON = os.path.dirname(os.__file__) + os.sep
TRACER = tuple(
    os.path.join(os.path.dirname(__file__), name) for name in ("provable.py", "tracing.py", "values.py", "blocks.py")
)
# what changes how torch runs, or runs code where a trace does not look
MODES = (
    "utils/_contextlib.py",
    "autograd/grad_mode.py",
    "autograd/function.py",
    "autograd/graph.py",
    "autograd/profiler.py",
    "amp/autocast_mode.py",
    "utils/checkpoint.py",
    "random.py",
)
# by opcode, in every Python from 3.10 on
REFUSED = {
    "BEFORE_WITH": "a with block",
    "SETUP_WITH": "a with block",
    "BEFORE_ASYNC_WITH": "a with block",
    "LOAD_SPECIAL": "a with block",  # Python 3.14
    "PUSH_EXC_INFO": "a try block",
    "SETUP_FINALLY": "a try block",
    "STORE_ATTR": "a store to an attribute",
    "DELETE_ATTR": "a deleted attribute",
    "STORE_GLOBAL": "a store to a global",
    "DELETE_GLOBAL": "a deleted global",
    "DELETE_SUBSCR": "a deleted item",
    "IMPORT_NAME": "an import",
    "MATCH_CLASS": "a match of classes",
    "MATCH_MAPPING": "a match of mappings",
    "MATCH_SEQUENCE": "a match of sequences",
    "GET_AWAITABLE": "an await",
}
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
# attributes of what is no module: a traced value, a list, a dict; and a method of the class above
OF_VALUES = frozenset(
    name for name in (*dir(torch.Tensor), *dir(list), *dir(dict), *dir(str), "forward") if not name.startswith("__")
)
CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format, type, type(None))
PURE_MODULES = ("torch", "math", "operator", "typing", "collections", "functools", "itertools", "builtins")
IMMUTABLE = (
    bool, int, float, complex, str, bytes, type(None), type, enum.Enum, torch.dtype, torch.device, torch.layout,
    torch.memory_format, FunctionType, BuiltinFunctionType, slice, range, frozenset,
)  # fmt: skip


# what may be a variable of the function around: names that are bound once, and what a trace sees
OF_OUTER = (fx.Proxy, nn.Module, FunctionType, BuiltinFunctionType, MethodType, type, ModuleType)


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


class Code(NamedTuple):
    """What a function holds: why it is refused, and which attributes of ``self`` and globals it reads."""

    refused: tuple[int, str] | None  # the first line that is, and what it holds
    attributes: tuple[tuple[str, ...], ...]
    names: tuple[tuple[str, tuple[str, ...], int], ...]
    of_values: tuple[tuple[str, int], ...]  # attributes of what should be a value of the trace
    none: tuple[tuple[str, int], ...]  # arguments that are held against None, and "" for another local variable


class Watch:
    """Sees every Python function before it runs inside; one that a trace cannot show raises :class:`Unprovable`."""

    def __init__(self) -> None:
        self._seen: set[tuple[CodeType, int]] = set()
        self._reads: list[tuple[nn.Module | None, tuple[str, ...], Any]] = []
        self._of_values: dict[str, tuple[CodeType, int]] = {}
        self.replaced: dict[Any, Any] = {}  # while it watches: what stands for a function of Python's, and that
        self._asked: list[tuple[Any, tuple[str, ...], Any]] = []  # read by name, of any module
        self.refused = ""  # said to a forward, which may have caught it
        self.asks_for_none = ""  # where a value is held against None
        self._watches = False
        self._containers: dict[int, tuple[Any, Any, str]] = {}

    def __enter__(self) -> "Watch":
        self._collects = gc.isenabled()
        gc.disable()  # what it calls is none of the forward's
        self._thread = threading.get_ident()
        self._before: tuple[Any, ...] = sys.getprofile(), builtins.getattr, builtins.hasattr
        builtins.getattr, builtins.hasattr = map(self._seen_asking, (getattr, hasattr))
        sys.setprofile(self._call)
        self._watches = True
        return self

    def __exit__(self, *_: object) -> None:
        self._watches = False
        sys.setprofile(self._before[0])
        _, builtins.getattr, builtins.hasattr = self._before
        if self._collects:
            gc.enable()

    def ask_class(self, module: nn.Module) -> None:
        """Note that the forward asks for the class of a module."""
        self._asked.append((module, (), ("class", own_name(module))))

    def sees(self, frame: FrameType) -> bool:
        """Whether a frame is one of the forward's that is watched."""
        return self._watches and self._thread == threading.get_ident() and not _is_trusted(frame)

    def refuse(self, code: CodeType, line: int, what: str) -> NoReturn:
        """Refuse the forward for what a function does in a line."""
        self._stop(_at(code, line, what))

    def refuse_value(self, frame: FrameType, what: str) -> None:
        """Refuse what a forward asks of a value past the trace."""
        if self.sees(frame):
            self.refuse(frame.f_code, frame.f_lineno, what)

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
                return _at(code, line, f"reads .{name}, which a {type(module).__name__} inside has, too")
        return ""

    def _call(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not _is_trusted(frame):
            self._look(frame)

    def _seen_asking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``getattr`` or ``hasattr`` such that what it is asked for in the forward is read."""

        def asked(*args: Any) -> Any:
            frame = sys._getframe(1)
            if len(args) > 1 and self.sees(frame):
                plainly = function is self._before[1] and len(args) == 2
                self._ask(frame.f_code, frame.f_lineno, *args[:2], plainly=plainly)
            return function(*args)

        self.replaced[asked] = function
        return asked

    def _ask(self, code: CodeType, line: int, of: Any, name: Any, *, plainly: bool) -> None:
        is_value = issubclass(type(of), fx.Proxy)  # which has any name
        if isinstance(of, nn.Module):
            _refuse_own_access(self, code, line, of)
            self._asked += _attributes(self, code, of, (name,), by_name=True)
        elif not (plainly if is_value else isinstance(of, (*IMMUTABLE, list, tuple, dict))) or name not in OF_VALUES:
            self.refuse(code, line, f"asks a {type(of).__name__} for {name}")

    def _look(self, frame: FrameType) -> None:
        code = frame.f_code
        names = frame.f_globals
        if code.co_filename.startswith(TORCH):
            self._stop(f"it changes how torch runs: {names['__name__']}.{code.co_name}")
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if (code, id(owner)) in self._seen:
            return
        if isinstance(owner, fx.GraphModule) and code is type(owner).forward.__code__:
            return  # written from a graph, which holds calls of modules and functions and nothing else
        self._seen.add((code, id(owner)))
        held = read_code(code)
        if held.refused:
            line, what = held.refused
            self.refuse(code, line, f"holds {what}")
        for name, line in held.of_values:
            self._of_values.setdefault(name, (code, line))
        for name, line in held.none:
            if not name or issubclass(type(frame.f_locals.get(name)), fx.Proxy):
                self.asks_for_none = _at(code, line, "holds a value against None")
        for name in code.co_freevars:
            value = frame.f_locals.get(name)
            if name != "__class__" and not isinstance(value, OF_OUTER):
                self.refuse(code, code.co_firstlineno, f"reads {name}, a variable of the function around it")
        for name in code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]:
            self.keep(frame.f_locals.get(name), f"its argument {name}")
        self._reads += _globals(self, code, held, names)
        if isinstance(owner, nn.Module):
            _refuse_own_access(self, code, code.co_firstlineno, owner)
            for attributes in held.attributes:
                self._reads += _attributes(self, code, owner, attributes)
        elif isinstance(owner, type) and any(
            not callable(getattr(owner, first, None)) for first, *_ in held.attributes
        ):
            self.refuse(code, code.co_firstlineno, f"reads attributes of the class {owner.__name__}")
        elif held.attributes and not isinstance(owner, (fx.Proxy, *IMMUTABLE, list, tuple)):
            self.refuse(code, code.co_firstlineno, f"reads attributes of a {type(owner).__name__}")


def _refuse_own_access(watch: Watch, code: CodeType, line: int, module: nn.Module) -> None:
    if type(module).__getattr__ is not nn.Module.__getattr__:  # the tracer's, while it runs
        watch.refuse(code, line, f"reads a {type(module).__name__}, which has a __getattr__")
    if type(module).__getattribute__ is not object.__getattribute__:
        watch.refuse(code, line, f"reads a {type(module).__name__}, which has a __getattribute__")


def contents(value: Any) -> list[int]:
    """Return what a list, dict or set holds, by identity; of anything else, itself."""
    if isinstance(value, dict):
        return [id(item) for item in (*value, *value.values())]
    return [id(item) for item in (value if isinstance(value, (list, set)) else [value])]


def refill(container: Any, before: Any) -> None:
    """Put back into a list, dict or set what a copy of it holds."""
    container.clear()
    container.extend(before) if isinstance(container, list) else container.update(before)


def _is_trusted(frame: FrameType) -> bool:
    """Whether a function is torch's own, but for the modes, or the tracer's, or runs on behalf of these."""
    if str(frame.f_globals.get("__name__")).startswith("namedtuple_"):  # which collections has generated
        return True
    if frame.f_code.co_filename.startswith("<frozen"):  # Python's own collections
        return True
    file = frame.f_code.co_filename
    while file.startswith(PYTHON) and "site-packages" not in file and frame.f_back is not None:
        frame = frame.f_back
        file = frame.f_code.co_filename
    if file.startswith(TORCH):
        return file[len(TORCH) :] not in MODES
    return file in TRACER


def _at(code: CodeType, line: int, what: str) -> str:
    return f"{os.path.basename(code.co_filename)}:{line} ({code.co_name}) {what}"


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


@functools.cache
def read_code(code: CodeType) -> Code:
    """Read what a function's code holds."""
    instructions = list(dis.get_instructions(code))
    refused: list[tuple[int, str]] = []
    attributes: set[tuple[str, ...]] = set()
    names: set[tuple[str, tuple[str, ...], int]] = set()
    of_values: set[tuple[str, int]] = set()
    none: set[tuple[str, int]] = set()
    stored = {name for i in instructions if i.opname.startswith("STORE_FAST") for name in (i.argval, *_pair(i))}
    line = code.co_firstlineno
    first = code.co_varnames[0] if code.co_argcount else None
    if any(i.opname.startswith(("STORE_FAST", "STORE_DEREF")) and first in (i.argval, *_pair(i)) for i in instructions):
        first = None  # it becomes another object
    for i, instruction in enumerate(instructions):
        starts = getattr(instruction, "line_number", instruction.starts_line)  # by its name in Python 3.13
        line = line if starts is None else starts
        name = instruction.opname
        if name in REFUSED:
            refused.append((line, REFUSED[name]))
        chain = []
        for following in instructions[i + 1 :]:
            if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            chain.append(str(following.argval).removesuffix(" + NULL|self"))
        # two loads may be one instruction
        loaded = (instruction.argval, *_pair(instruction))[-1]
        is_self = name.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded == first
        if is_self and chain:
            attributes.add(tuple(chain))
        is_global = name in ("LOAD_GLOBAL", "LOAD_NAME")
        if not (is_self or is_global or name in ("LOAD_ATTR", "LOAD_METHOD")):
            if unknown := [name for name in chain if name not in OF_VALUES]:
                refused.append((line, f"a read of .{unknown[0]}, of an object that is not self"))
            reads = itertools.takewhile(lambda following: following.opname == "LOAD_ATTR", instructions[i + 1 :])
            of_values |= {(read.argval, line) for read in reads if "NULL|self" not in read.argrepr}
        if operands := _compared(instructions, i, first):
            left, right = sorted(operands, key=NONE.__eq__)  # None last
            known = left in (OF_SELF, GLOBAL, NONE) and (left, right) != (OF_SELF, OF_SELF)
            if left == "." or (right != NONE and not (known and right in (OF_SELF, GLOBAL))):
                refused.append((line, "a comparison by identity"))
            elif not known:
                none.add(("" if left in stored else left, line))
        if is_global:
            names.add((instruction.argval, tuple(chain), line))
    if code.co_flags & 0x20 and not code.co_name.startswith("<"):
        refused.append((code.co_firstlineno, "a yield"))
    return Code(
        refused[0] if refused else None, tuple(sorted(attributes)), tuple(sorted(names)), tuple(of_values), tuple(none)
    )


OF_SELF, GLOBAL, NONE = "self.", "global", "None"  # which are no names of variables


def _compared(instructions: list[dis.Instruction], i: int, first: str | None) -> tuple[str, ...]:
    """Return both sides of a comparison by identity, as :func:`_expression` tells them; nothing for any other step."""
    name = instructions[i].opname
    if "_IF_NONE" in name or "_IF_NOT_NONE" in name:
        return _expression(instructions, i - 1, first)[1], NONE
    if name != "IS_OP":
        return ()
    start, right = _expression(instructions, i - 1, first)
    return _expression(instructions, start - 1, first)[1], right


def _expression(instructions: list[dis.Instruction], end: int, first: str | None) -> tuple[int, str]:
    """Return where an expression starts that ends at a step, and what it is.

    A variable's name; "." for an attribute of one; what is read of self; a global or a constant; None; or "" for a call
    and the like.
    """
    i = end
    if instructions[i].opname == "CALL":  # getattr(of, name, default), which no value is asked
        called = [step for step in instructions[max(0, i - 6) : i] if step.opname not in ("PRECALL", "PUSH_NULL")][-4:]
        if called[0].argval == "getattr" and all(step.opname.startswith("LOAD_") for step in called):
            return instructions.index(called[0]), GLOBAL
    while i > 0 and instructions[i].opname == "LOAD_ATTR":
        i -= 1
    name, argument = instructions[i].opname, instructions[i].argval
    if name in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_CONST"):
        return i, NONE if name == "LOAD_CONST" and argument is None else GLOBAL
    if name.startswith(("LOAD_FAST", "LOAD_DEREF")) and argument == first:
        return i, OF_SELF
    if name.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return i, argument if isinstance(argument, str) and i == end else "."
    return i, "" if i == end else "."


def _pair(instruction: dis.Instruction) -> tuple[Any, ...]:
    """Return the two names of an instruction that is two in one."""
    return instruction.argval if isinstance(instruction.argval, tuple) else ()


Found = Iterator[tuple[nn.Module | None, tuple[str, ...], Any]]


def _globals(watch: Watch, code: CodeType, held: Code, names: dict[str, Any]) -> Found:
    module = str(names.get("__name__"))
    if held.names and getattr(sys.modules.get(module), "__dict__", None) is not names:
        watch.refuse(code, code.co_firstlineno, f"reads globals of {module}, which is no module that can be imported")
    for name, chain, line in held.names:
        if name not in names:
            built_in = getattr(builtins, name, None)
            if name not in BUILTINS and not (isinstance(built_in, type) and issubclass(built_in, BaseException)):
                watch.refuse(code, line, f"calls {name}")
            yield None, (module, name), None
            continue
        value = names[name]
        if asked := ASKS_A_MODE.intersection((name, *chain)):
            watch.refuse(code, line, f"asks {min(asked)}, which may change from call to call")
        if isinstance(value, ModuleType):
            root = value.__name__.partition(".")[0]
            if root not in PURE_MODULES or not _is_constant(value, chain):
                watch.refuse(code, line, f"reads the module {value.__name__}")
            yield None, (module, name), value
        elif isinstance(value, type):
            of_class = getattr(value, chain[0], None) if chain else None
            is_constant = callable(of_class) or isinstance(of_class, enum.Enum) or value.__module__.startswith("torch")
            if chain and not is_constant:
                watch.refuse(code, line, f"reads {name}.{chain[0]}, an attribute of a class")
            yield None, (module, name), value
        elif isinstance(value, (FunctionType, BuiltinFunctionType)):
            if value.__module__ == "builtins":
                watch.refuse(code, line, f"calls {name}, which is {value.__name__}")
            if chain:
                watch.refuse(code, line, f"reads {name}.{chain[0]}, an attribute of a function")
            yield None, (module, name), value
        elif type(value).__module__.partition(".")[0] not in ("torch", "typing"):
            watch.keep(value, f"the global {name}")
            yield None, (module, name), _kept(watch, code, line, value, f"the global {name}")


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


def _attributes(watch: Watch, code: CodeType, owner: nn.Module, chain: tuple[str, ...], by_name: bool = False) -> Found:
    """Yield what ``self.a.b`` reads."""
    value: Any = owner
    line = code.co_firstlineno
    for i, name in enumerate(chain):
        so_far = chain[: i + 1]
        what = f"self.{'.'.join(so_far)}"
        if name in ("__dict__", "__class__", "_buffers", "_parameters", "_modules"):
            watch.refuse(code, line, f"reads {what}")
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
                watch.refuse(code, line, f"reads {what}, a tensor that is no buffer")
            yield owner, so_far, TENSOR
        elif isinstance(value, MethodType):
            inherited = getattr(nn.Module, name, None) is value.__func__
            if type(value.__self__).__name__ == "FloatFunctional":
                return  # torch's add and ReLU as methods of a module
            if (i or inherited) and name not in ("children", "named_children", "get_submodule"):
                yield owner, so_far, UNKNOWN
                watch.refuse(code, line, f"calls {what}, a method that a trace does not enter")
            yield owner, so_far, value.__func__
        elif i + 1 < len(chain) and _is_plain(value, chain[i + 1]):
            continue
        elif value is _MISSING:
            if by_name:  # it may appear
                yield owner, so_far, ABSENT
        else:
            watch.keep(value, what)
            yield owner, so_far, UNKNOWN
            yield owner, so_far, _kept(watch, code, line, value, what)
        return


_MISSING = object()
UNKNOWN = object()  # what nothing is the same as: where it is refused, another module may not be
TENSOR, ABSENT = "a tensor", "no such attribute"


def _is_plain(value: Any, name: str) -> bool:
    """Whether reading an attribute of an object, such as a configuration, runs no code and gives what it holds."""
    if isinstance(value, (*IMMUTABLE, ModuleType, list, dict, set, tuple)):
        return False
    cls = type(value)
    if any("__getattribute__" in vars(c) or "__getattr__" in vars(c) for c in cls.__mro__[:-1]):
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


def own_name(module: nn.Module) -> tuple[str, str]:
    """Return what a class is known by; fused, it keeps that."""
    return type(module).__module__, type(module).__qualname__


def _kept(watch: Watch, code: CodeType, line: int, value: Any, what: str) -> Any:
    try:
        return frozen(value)
    except TypeError:
        watch.refuse(code, line, f"reads {what}, a {type(value).__name__}, which may change unseen")


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
