"""What a trace of a forward cannot show, read off the code of every function that it runs.

``torch.fx`` records what happens to tensors, and nothing else: a ``with`` block, a store, a print are lost, and what
else steers a forward is frozen.  So every Python function that a trace enters is watched, and its code is read: what it
may not hold refuses the forward, with file and line; what it reads besides tensors becomes a guard
(:class:`fused_resnet.tracing.ledger.Read`).
"""

import builtins
import gc
import sys
import threading
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import fx, nn

from fused_resnet.blocks.guards import IMMUTABLE, own_name
from fused_resnet.tracing.code import OF_VALUES, read_code
from fused_resnet.tracing.ledger import Ledger, at
from fused_resnet.tracing.reads import attributes_read, globals_read, refuse_own_access
from fused_resnet.tracing.trust import TORCH, is_trusted

# what may be a variable of the function around: names that are bound once, and what a trace sees
OF_OUTER = (fx.Proxy, nn.Module, FunctionType, BuiltinFunctionType, MethodType, type, ModuleType)


class Watch(Ledger):
    """Sees every Python function before it runs inside; one that a trace cannot show raises ``Unprovable``."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced: dict[Any, Any] = {}  # while it watches: what stands for a function of Python's, and that
        self._seen: set[tuple[CodeType, int]] = set()
        self._watches = False

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

    def sees(self, frame: FrameType) -> bool:
        """Whether a frame is one of the forward's that is watched."""
        return self._watches and self._thread == threading.get_ident() and not is_trusted(frame)

    def refuse_value(self, frame: FrameType, what: str) -> None:
        """Refuse what a forward asks of a value past the trace."""
        if self.sees(frame):
            self.refuse(frame.f_code, frame.f_lineno, what)

    def ask_class(self, module: nn.Module) -> None:
        """Note that the forward asks for the class of a module."""
        self._asked.append((module, (), ("class", own_name(module))))

    def _call(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not is_trusted(frame):
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
            refuse_own_access(self, code, line, of)
            self._asked += attributes_read(self, code, of, (name,), by_name=True)
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
                self.asks_for_none = at(code, line, "holds a value against None")
        for name in code.co_freevars:
            value = frame.f_locals.get(name)
            if name != "__class__" and not isinstance(value, OF_OUTER):
                self.refuse(code, code.co_firstlineno, f"reads {name}, a variable of the function around it")
        for name in code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]:
            self.keep(frame.f_locals.get(name), f"its argument {name}")
        self._reads += globals_read(self, code, held, names)
        if isinstance(owner, nn.Module):
            refuse_own_access(self, code, code.co_firstlineno, owner)
            for attributes in held.attributes:
                self._reads += attributes_read(self, code, owner, attributes)
        elif isinstance(owner, type) and any(
            not callable(getattr(owner, first, None)) for first, *_ in held.attributes
        ):
            self.refuse(code, code.co_firstlineno, f"reads attributes of the class {owner.__name__}")
        elif held.attributes and not isinstance(owner, (fx.Proxy, *IMMUTABLE, list, tuple)):
            self.refuse(code, code.co_firstlineno, f"reads attributes of a {type(owner).__name__}")
