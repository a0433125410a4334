"""What stands for a value while a forward is traced, and what Python asks of it past the trace.

Arithmetic and calls are recorded.  Its class, its identity, its hash and its text are asked of the object itself, which
knows none of them: what cannot be known refuses the forward.
"""

import builtins
import contextlib
import operator
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute

from fused_resnet.blocks.layers import is_batch_norm
from fused_resnet.blocks.plan import TENSOR, TENSORS
from fused_resnet.blocks.subclasses import layer_class
from fused_resnet.tracing.ledger import Unprovable
from fused_resnet.tracing.watch import Watch

IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
ARITHMETIC = (*IN_PLACE, operator.add, operator.sub, operator.mul, operator.truediv, operator.neg)
# functions and methods of tensors that give one tensor, by name
OF_TENSORS = frozenset((
    "relu", "relu_", "leaky_relu", "silu", "gelu", "sigmoid", "tanh", "hardswish", "relu6", "dropout", "cat", "pad",
    "interpolate", "mean", "add", "add_", "mul", "mul_", "sub", "div", "view", "reshape", "flatten", "contiguous",
    "permute", "transpose", "clone", "detach", "to", "float", "half", "double", "adaptive_avg_pool2d", "avg_pool2d",
))  # fmt: skip
NO_TENSOR = (nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.AdaptiveLogSoftmaxWithLoss)
TEXT = re.compile("\ue000(\\d+)\ue001")  # of a value, until the trace reaches what it is for
_A_TENSOR = torch.empty(0)


class _Opaque(fx.Proxy):
    """What Python may ask of any value."""

    _is_param = _is_buffer = False
    tracer: Any

    def __getattr__(self, name: str) -> Any:
        return _ValueAttribute(self, name)

    def __hash__(self) -> int:
        self.tracer.watch.refuse_value(sys._getframe(1), "uses a value as a key")
        return object.__hash__(self)

    def __str__(self) -> str:
        return self._text("!s", sys._getframe(1))

    def __repr__(self) -> str:
        return self._text("!r", sys._getframe(1))

    def __format__(self, spec: str) -> str:
        return self._text(f":{spec}" if spec else "", sys._getframe(1))

    def _text(self, how: str, frame: Any) -> str:
        watch: Watch = self.tracer.watch
        if not watch.sees(frame):
            return type(self).__name__
        texts: list[Any] = self.tracer.texts
        texts.append((self, f"{{{how}}}"))
        return f"\ue000{len(texts) - 1}\ue001"


class Value(_Opaque):
    """A value of a trace; torch's C++ is never told that it is a tensor."""

    def __iter__(self) -> Iterator[Any]:
        if self.node.op == "placeholder":  # how many there are is asked of what it stands for
            raise Unprovable("it takes an argument apart")
        return super().__iter__()


class _ValueAttribute(_Opaque, Attribute):
    """``value.name``, or a method of it that is called next."""


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], fx.Proxy]:
    """Return how a value is written to: fx would make ``x += y`` an add."""
    return lambda value, other: value.tracer.create_proxy("call_function", operation, (value, other), {})


for _operation in IN_PLACE:
    setattr(_Opaque, f"__{_operation.__name__}__", _in_place(_operation))


def target_name(node: fx.Node) -> str:
    """Return the name of the function, method or module that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_tensor(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node of a trace is known to give a tensor, whatever the children do that it did not go into."""
    if node.op == "placeholder":
        return bool(node.meta["kind"] == TENSOR)
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        own = layer_class(module).__module__.startswith("torch.nn.modules") and not isinstance(module, NO_TENSOR)
        return (own or is_batch_norm(module)) and not getattr(module, "return_indices", False)
    known = node.target in ARITHMETIC or target_name(node) in OF_TENSORS
    return node.op != "get_attr" and known and any(is_tensor(root, operand) for operand in node.all_input_nodes)


def written_text(tracer: Any, text: str) -> fx.Node | str:
    """Return the text that a forward makes of values: what formats it anew in every call."""
    first, *rest = TEXT.split(text.replace("{", "{{").replace("}", "}}"))
    if not rest:
        return text
    indices = [int(index) for index in rest[::2]]
    tracer.written.update(indices)
    template = first + "".join(tracer.texts[i][1] + piece for i, piece in zip(indices, rest[1::2], strict=True))
    values = [tracer.texts[i][0] for i in indices]
    node: fx.Node = tracer.create_proxy("call_method", "format", (template, *values), {}).node
    return node


@contextlib.contextmanager
def python_asks(watch: Watch, root: nn.Module) -> Iterator[None]:
    """Let ``isinstance`` and ``callable`` answer for what a value stands for, where that is known."""
    before = builtins.isinstance, builtins.callable

    def is_instance(value: Any, classes: Any) -> bool:
        frame = sys._getframe(1)
        if before[0](value, nn.Module) and watch.sees(frame):
            watch.ask_class(value)
        if not before[0](value, fx.Proxy):
            return before[0](value, classes)
        if watch.sees(frame):
            if value.node.meta.get("kind") == TENSORS:
                return before[0]([], classes)
            if not is_tensor(root, value.node):
                watch.refuse_value(frame, "asks for the class of a value")
        return before[0](value, classes) or (type(value) is Value and before[0](_A_TENSOR, classes))

    def is_callable(value: Any) -> bool:
        frame = sys._getframe(1)
        if before[0](value, fx.Proxy) and watch.sees(frame):
            watch.refuse_value(frame, "asks whether a value can be called")
        return before[1](value)

    builtins.isinstance, builtins.callable = is_instance, is_callable  # type: ignore[assignment]
    try:
        yield
    finally:
        builtins.isinstance, builtins.callable = before
