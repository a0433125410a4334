"""Trace a forward with ``torch.fx``: its graph, what steered the trace there, and that it has changed nothing."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import fx, nn

from fused_resnet.blocks.frozen import is_frozen_norm
from fused_resnet.blocks.fusion import fusion_of
from fused_resnet.blocks.guards import kind
from fused_resnet.blocks.mixin import own_class
from fused_resnet.blocks.plan import TENSOR, VALUE, Container, Path, Reads
from fused_resnet.blocks.subclasses import layer_class
from fused_resnet.system import generators
from fused_resnet.tracing.ledger import Unprovable, contents, refill
from fused_resnet.tracing.values import Value, is_tensor, python_asks, written_text
from fused_resnet.tracing.watch import Watch


class Traced(NamedTuple):
    """A forward's graph, or why there is none; and what was read of the modules it went through, and of globals."""

    graph: fx.Graph | None
    refused: str
    containers: tuple[Container, ...]
    globals: Reads


def is_primitive(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers, or a batch norm of any kind, which a trace does not go into."""
    if is_frozen_norm(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return layer_class(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


class _Tracer(fx.Tracer):
    """Trace a forward with ``arguments``, by name what each is taken for; every other keeps its default.

    ``deep`` goes through the module's own children down to torch's layers; otherwise every child is a leaf, but for
    those whose paths are in ``through``.
    """

    # a forward that writes into a buffer does so at every call, and never while it is traced
    proxy_buffer_attributes = True

    def __init__(self, deep: bool, through: Collection[Path], arguments: Mapping[str, str], watch: Watch):
        super().__init__()
        self.arguments = arguments
        self.deep = deep
        self.through = {".".join(path) for path in through}
        self.watch = watch
        self.entered: dict[str, nn.Module] = {}
        self.texts: list[tuple[fx.Proxy, str]] = []  # what a forward made text of
        self.written: set[int] = set()  # and which of it the graph makes again

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return super().create_node(kind, self.watch.replaced.get(target, target), *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, str):
            return written_text(self, a)
        if type(a) is OrderedDict:  # which fx would make a dict
            return self.create_proxy("call_function", OrderedDict, (list(a.items()),), {}).node
        if isinstance(a, nn.Module) or (isinstance(a, (list, dict)) and type(a) not in (list, dict)):
            raise Unprovable(f"it returns or hands on a {type(a).__name__}")
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        def forward(*args: Any) -> Any:
            with self.watch, python_asks(self.watch, self.root):
                return root_fn(*args)

        given = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments]
        for proxy, taken_for in zip(given, self.arguments.values(), strict=True):
            proxy.node.meta["kind"] = taken_for
        return forward, [self.root, *given]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        enters = self.deep or any(f"{module_qualified_name}.".startswith(f"{name}.") for name in self.through)
        leaf = not enters or is_primitive(m) or fusion_of(m) is not None
        if not leaf:
            self.entered[module_qualified_name] = m
        return leaf


_TURN = threading.RLock()


def trace(
    module: nn.Module,
    deep: bool,
    through: Collection[Path] = (),
    arguments: Mapping[str, str] = MappingProxyType({"x": TENSOR}),
) -> Traced:
    """Trace a module's forward in the mode that it is in; one at a time, as a trace patches Python and torch.

    ``deep`` goes through the module's own children down to torch's layers; otherwise every child is a leaf, but for
    those whose paths are in ``through``.  ``arguments`` are those given, in order, and what each is taken for.
    """
    modules = [m for m in module.modules() if not is_primitive(m)]
    before = [_state(m) for m in modules]
    random_before = generators.state()
    watch = Watch()
    tracer = _Tracer(deep, through, arguments, watch)
    graph, refused = None, ""
    try:
        with _TURN:
            graph = tracer.trace(module)
    except Exception as error:  # whatever a forward holds meets the tracer; what it says is the reason reported
        refused = str(error).strip() or type(error).__name__
    paths = {m: tuple(filter(None, name.split("."))) for name, m in {"": module, **tracer.entered}.items()}
    drew = generators.state() != random_before
    if drew:
        generators.restore(random_before)
    changed = watch.restore()
    changed += [f"self.{name}" for m, state in zip(modules, before, strict=True) for name in _restore(m, state)]
    called = [node for node in graph.nodes if node.op == "call_module"] if graph is not None else []
    may_be_none = VALUE in arguments.values() or not all(is_tensor(module, node) for node in called)
    refused = (
        refused
        or watch.refused
        or watch.strangers(module, paths)
        or watch.hidden(module)
        or ("it makes text of a value" if len(tracer.written) < len(tracer.texts) else "")
        or (watch.asks_for_none if may_be_none else "")
        or ("it draws random numbers" if drew else "")
        or (f"it changes {changed[0]}" if changed else "")
    )
    for node in graph.nodes if graph is not None else ():
        node.type = None  # an annotation, which need not be a name that can be imported
    reads: dict[Path | None, dict[tuple[Any, ...], tuple[tuple[str, ...], Any]]] = {}
    for read in watch.reads(module, paths):  # of a module, its children and its class are two things
        reads.setdefault(read.path, {})[read.names, kind(read.value)] = read.names, read.value
    containers = tuple(_container(path, m, tuple(reads.get(path, {}).values())) for m, path in paths.items())
    return Traced(None if refused else graph, refused, containers, tuple(reads.get(None, {}).values()))


def _state(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, collections as copies of one level."""
    return {
        name: type(value)(value) if isinstance(value, (list, dict, set)) else value
        for name, value in vars(module).items()
    }


def _restore(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Undo what a trace did to a module's attributes and return the names of those it changed."""
    changed = []
    for name in {**vars(module), **before}:
        now, then = vars(module).get(name, _MISSING), before.get(name, _MISSING)
        if contents(now) == contents(then):
            continue
        changed.append(name)
        if then is _MISSING:
            del vars(module)[name]
        elif isinstance(now, (list, dict, set)) and type(now) is type(then):
            refill(now, then)
        else:
            vars(module)[name] = then
    return changed


_MISSING = object()


def _container(path: Path, module: nn.Module, reads: Reads) -> Container:
    children = tuple(module._modules)
    missing = tuple(name for name in children if module._modules[name] is None)
    return Container(path, own_class(module), children, missing, reads)
