"""Find the chains in a module by the dataflow of its forward.

The forward is traced with ``torch.fx``.  A chain is conv → batch norm → ReLU with single consumers, repeated, and
perhaps an add with a shortcut, a last ReLU, or a max pool.  No class is known by name: torchvision's blocks, timm's,
Hugging Face's and one's own are found alike.
"""

import contextlib
import operator
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.blocks import (
    BATCH_NORMS,
    FUNCTION,
    BlockPaths,
    ChainPaths,
    Container,
    Path,
    Plan,
    UnitPaths,
    child,
    fusion_of,
    is_frozen_norm,
    prepare,
    why_not_as_traced,
    why_not_pool,
)
from fused_resnet.chain_spec import IDENTITY, NOT_PADDED, Padded, Pair
from fused_resnet.tracing import is_primitive, trace
from fused_resnet.values import IN_PLACE, target_name

RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
ADD_FUNCTIONS = ("add", "add_", "iadd")
# modules that a chain can hold; a forward that reaches any other is never one chain as a whole
CHAIN_MODULES = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Identity)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class _Found(NamedTuple):
    """What a trace of a forward found.

    Attributes
    ----------
    containers
        What steered it.
    plan
        How the forward can run, or why it has no chain.
    traced
        Whether there is a graph.
    may_be_part
        Whether all in it but the children that are leaves may be in one chain.
    """

    containers: tuple[Container, ...]
    plan: Plan | str
    traced: bool = True
    may_be_part: bool = False


class Finder:
    """Finds how the forwards of a model's modules can run with chains in them.

    What was found for a module holds for every other that a trace could not tell from it: it has the same classes in
    it, and is equal in all that was read.

    Parameters
    ----------
    options
        Engine and memory of the chains.
    stages
        Let a chain go on behind the add at a block's end.
    """

    def __init__(self, options: tuple[str, str], stages: bool = False):
        self.options = options
        self.stages = stages
        self._known: dict[Hashable, list[_Found]] = {}
        self._parts: dict[tuple[nn.Module, bool], bool] = {}

    def plans(self, module: nn.Module) -> dict[bool, Plan] | str:
        """Return a module's plans for training and eval, or why it has none."""
        if "forward" in vars(module):
            return "it has a forward of its own"
        if type(module).forward is nn.Module.forward:
            return "it has no forward"
        containers = [m for m in module.modules() if not is_primitive(m)]
        shape = _shape(module)
        found: dict[bool, Plan | str] = {}
        for training in (True, False):
            with _in_mode(containers, training):
                found[training] = self._plan(module, shape, training)
        plans = {training: plan for training, plan in found.items() if isinstance(plan, Plan)}
        return plans or str(found[True])

    def _plan(self, module: nn.Module, shape: Hashable, training: bool) -> Plan | str:
        reason = ""
        for deep in (True, False):
            try:
                if deep and (all(map(is_primitive, module.children())) or not self._may_be_part(module, training)):
                    continue
                plan = self._find(module, shape, deep).plan
                if isinstance(plan, Plan):
                    prepared = prepare(module, plan)
                    if not isinstance(prepared, str):
                        return plan
                    plan = prepared
            except Exception as error:  # nothing that a module holds ends fuse
                plan = _untraceable(str(error).strip() or type(error).__name__)
            reason = plan or reason
        return reason

    def _may_be_part(self, module: nn.Module, training: bool) -> bool:
        """Whether a forward that runs a module may be one chain as a whole."""
        if is_primitive(module):
            return type(module) in CHAIN_MODULES or is_norm(module)
        if fusion_of(module) is not None:
            return False
        if (module, training) not in self._parts:
            part = all(self._may_be_part(child, training) for child in module.children())
            if part and type(module).forward is not nn.Module.forward:
                shape = _shape(module)
                found = self._find(module, shape, deep=False)
                part = (found if found.traced else self._find(module, shape, deep=True)).may_be_part
            self._parts[module, training] = part
        return self._parts[module, training]

    def _find(self, module: nn.Module, shape: Hashable, deep: bool) -> _Found:
        known = self._known.setdefault((shape, deep), [])
        for found in known:
            if not any(why_not_as_traced(module, container) for container in found.containers):
                return found
        known.append(self._trace(module, deep))
        return known[-1]

    def _trace(self, module: nn.Module, deep: bool) -> _Found:
        """Find the chains of a forward; the reason is empty where a deep trace shows what the children's own will."""
        graph, refused, containers, read_globals = trace(module, deep)
        if graph is None:
            return _Found(containers, _untraceable(refused), traced=False)
        identities = _drop_identities(module, graph)
        matcher = _Matcher(module, graph)
        may_be_part = matcher.knows_all()
        matches = matcher.matches()
        if self.stages:
            matches = _joined(matches)
        of_children = {path[0] for match in matches for block in match.paths for path in block.modules}
        if deep and (not _is_whole(graph, matches) or len(of_children) == 1):
            return _Found(containers, "", may_be_part=may_be_part)
        if not matches:
            return _Found(containers, why_no_match(module), may_be_part=may_be_part)
        paths = tuple(match.paths for match in matches)
        source = _write_forward(graph, matches)
        plan = Plan(paths, containers, identities, source, self.options, read_globals)
        return _Found(containers, plan, may_be_part=may_be_part)


def _untraceable(reason: str) -> str:
    return f"its forward cannot be traced: {reason.splitlines()[0]}"


@contextlib.contextmanager
def _in_mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Put modules into training or eval for a while, one by one."""
    modes = [m.training for m in modules]
    for m in modules:
        m.training = training
    try:
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode


def _shape(module: nn.Module) -> Hashable:
    """Return what tracing and matching know of a module without a read: what is where in it, and what is twice."""
    places: dict[nn.Module, int] = {}

    def look(m: nn.Module | None) -> Hashable:
        if m is None or m in places:
            return m and places[m]
        places[m] = len(places)
        if is_primitive(m):
            return type(m), bool(getattr(m, "inplace", False)), type(m) is nn.MaxPool2d and why_not_pool(m, ())
        return type(m), tuple((name, look(inner)) for name, inner in m._modules.items())

    return look(module)


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a normalisation layer of any kind."""
    return isinstance(module, NORMS) or (module is not None and is_frozen_norm(module))


def why_no_match(module: nn.Module) -> str:
    """Return why a norm of a module is in no chain."""
    for name, inner in module.named_children():
        if is_norm(inner) and not is_frozen_norm(inner) and type(inner) not in BATCH_NORMS:
            return f"{name} is a {type(inner).__name__}, not a BatchNorm2d"
    return "no conv → batch norm → ReLU with single consumers in its forward"


class _Unit(NamedTuple):
    conv: fx.Node | None
    norm: fx.Node
    act: fx.Node | None

    @property
    def nodes(self) -> list[fx.Node]:
        return [node for node in self if node is not None]

    @property
    def x(self) -> fx.Node:
        return _operand(self.conv or self.norm)

    @property
    def end(self) -> fx.Node:
        return self.act or self.norm


class _Match(NamedTuple):
    paths: ChainPaths
    x: fx.Node
    shortcut: fx.Node | None  # where it is not x
    nodes: list[fx.Node]
    end: fx.Node


class _Matcher:
    """Finds the chains in the graph of one forward."""

    def __init__(self, root: nn.Module, graph: fx.Graph):
        self.root = root
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        # a convolution or norm called twice would need its gradient from two places
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.shared = {target for target, count in calls.items() if count > 1}
        self.adds: set[fx.Node] = set()  # that a chain ends in; the other branch's does not

    def matches(self) -> list[_Match]:
        """Return the chains in the order in which they end; no node is in two."""
        rows: dict[fx.Node, list[_Unit]] = {}  # by their last node
        taken: set[fx.Node] = set()
        for node in self.order:
            if node not in taken and (row := self._row(node)):
                rows[row[-1].end] = row
                taken.update(node for unit in row for node in unit.nodes)
        matches = []
        for end, row in sorted(rows.items(), key=lambda item: -len(item[1])):  # of two in one add, the longer leads
            if end in rows and (match := self._match(row, rows)):
                matches.append(match)
        return sorted(matches, key=lambda match: self.order[match.end])

    def knows_all(self) -> bool:
        """Whether a chain can hold every node of the graph, but for children that a trace may yet go into."""
        return all(
            node.op in ("placeholder", "output")
            or (node.op == "call_module" and not is_primitive(child(self.root, _path(node))))
            or type(_called(self.root, node)) in CHAIN_MODULES
            or self._is_norm(node)
            or self._is_relu(node)
            or target_name(node) in ADD_FUNCTIONS
            or _zero_channels(node) is not None
            or _strides(node) is not None
            for node in self.order
        )

    def _row(self, node: fx.Node | None) -> list[_Unit]:
        """Return the longest row of units that starts at a node; all but the first have a convolution."""
        row: list[_Unit] = []
        while node is not None and (unit := self._unit(node)) and (not row or unit.conv is not None):
            row.append(unit)
            node = self._consumer(unit.end)
        return row

    def _unit(self, node: fx.Node) -> _Unit | None:
        conv = node if self._calls(node, nn.Conv2d) and node.target not in self.shared else None
        norm = node if conv is None else self._consumer(conv)
        if norm is None or not self._is_norm(norm) or norm.target in self.shared:
            return None
        act = self._consumer(norm)
        return _Unit(conv, norm, act if act is not None and self._is_relu(act) else None)

    def _match(self, row: list[_Unit], rows: dict[fx.Node, list[_Unit]]) -> _Match | None:
        """Make a chain of a row and of what it ends in: an add and its ReLU, a max pool, or nothing."""
        units = [self._unit_paths(unit) for unit in row]
        nodes = [node for unit in row for node in unit.nodes]
        x, end = row[0].x, row[-1].end
        shortcut: fx.Node | None = None
        shortcut_paths: UnitPaths | Padded | str | None = None
        pool: fx.Node | None = None
        consumer = self._consumer(end)
        other = None if consumer is None or row[-1].act is not None else self._added(consumer, end)
        side = rows.get(other, []) if other is not None else []
        is_projection = len(side) == 1 and side[0].conv is not None and side[0].act is None
        if consumer in self.adds or (other is not None and not is_projection and self._writes_to(other, consumer)):
            other = None
        if consumer is not None and other is not None:
            if is_projection:
                del rows[other]
                nodes += side[0].nodes
                shortcut, shortcut_paths = side[0].x, self._unit_paths(side[0])
            else:
                shortcut, shortcut_paths, padding = self._padded(other)
                nodes += padding
            nodes.append(consumer)
            self.adds.add(consumer)
            end = consumer
            relu = self._consumer(end)
            if relu is not None and self._is_relu(relu):
                nodes.append(relu)
                units[-1] = units[-1]._replace(act=self._act_path(relu))
                end = relu
        elif consumer is not None and self._pools(consumer):
            nodes.append(consumer)
            end = pool = consumer
        elif len(nodes) == 1:
            return None  # a batch norm alone
        if self._is_changed_before(end, x, nodes) or (shortcut and self._is_changed_before(end, shortcut, nodes)):
            return None
        in_place = shortcut_paths is not None and _changes_in_place(self.root, consumer or end)
        paths = BlockPaths(tuple(units), shortcut_paths, None if pool is None else _path(pool), in_place)
        return _Match((paths,), x, None if shortcut is x else shortcut, nodes, end)

    def _padded(self, end: fx.Node) -> tuple[fx.Node, Padded | str, list[fx.Node]]:
        """Return what a shortcut without parameters starts from, its kind, and the nodes that stride and pad it."""
        padded, nodes = NOT_PADDED, []
        if len(end.users) == 1 and (channels := _zero_channels(end)):
            padded = Padded(padded.stride, *channels)
            nodes.append(end)
            end = _operand(end)
        if len(end.users) == 1 and (stride := _strides(end)):
            padded = padded._replace(stride=stride)
            nodes.append(end)
            end = _operand(end)
        return end, padded if nodes else IDENTITY, nodes

    def _unit_paths(self, unit: _Unit) -> UnitPaths:
        return UnitPaths(
            None if unit.conv is None else _path(unit.conv),
            _path(unit.norm),
            None if unit.act is None else self._act_path(unit.act),
        )

    def _act_path(self, node: fx.Node) -> Path | str:
        return _path(node) if node.op == "call_module" else FUNCTION

    def _consumer(self, node: fx.Node) -> fx.Node | None:
        """Return the only consumer of a node's value, or None."""
        consumer = next(iter(node.users), None)
        return consumer if len(node.users) == 1 and consumer is not None and consumer.op != "output" else None

    def _calls(self, node: fx.Node, cls: type) -> bool:
        return type(_called(self.root, node)) is cls

    def _pools(self, node: fx.Node) -> bool:
        """Whether a node is a max pool that the kernels know; any other leaves the units in front of it their chain."""
        pool = _called(self.root, node)
        return type(pool) is nn.MaxPool2d and why_not_pool(pool, _path(node)) is None

    def _is_norm(self, node: fx.Node) -> bool:
        called = _called(self.root, node)
        return called is not None and (type(called) in BATCH_NORMS or is_frozen_norm(called))

    def _is_relu(self, node: fx.Node) -> bool:
        function = node.op in ("call_function", "call_method") and node.target in RELU_FUNCTIONS
        return function or self._calls(node, nn.ReLU)

    def _added(self, node: fx.Node, main: fx.Node) -> fx.Node | None:
        """Return what a node adds to ``main``, or None where it does not add two different tensors."""
        if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
            return None
        if target_name(node) not in ADD_FUNCTIONS:
            return None
        other = node.args[1] if node.args[0] is main else node.args[0]
        return other if isinstance(other, fx.Node) and other is not main else None

    def _writes_to(self, operand: fx.Node, node: fx.Node | None) -> bool:
        """Whether a node puts its result into an operand, where others may see it."""
        return node is not None and _changes_in_place(self.root, node) and node.args[0] is operand

    def _is_changed_before(self, end: fx.Node, x: fx.Node, nodes: list[fx.Node]) -> bool:
        """Whether anything else changes ``x`` in place before the chain, which runs at its end, reads it."""
        return any(
            user not in nodes and self.order[user] < self.order[end] and _changes_in_place(self.root, user)
            for user in x.users
        )


def _joined(matches: list[_Match]) -> list[_Match]:
    """Join every chain to the one that it follows."""
    joined: list[_Match] = []
    for match in matches:
        front = joined[-1] if joined else None
        if front is not None and _follows(match, front):
            paths, nodes = front.paths + match.paths, front.nodes + match.nodes
            joined[-1] = _Match(paths, front.x, front.shortcut, nodes, match.end)
        else:
            joined.append(match)
    return joined


def _follows(match: _Match, front: _Match) -> bool:
    """Whether a chain begins with the sum that another ends in, and nothing else reads that."""
    begins = match.x is front.end and match.shortcut is None and front.paths[-1].shortcut is not None
    return begins and all(user in match.nodes for user in front.end.users)


def _path(node: fx.Node) -> Path:
    return tuple(str(node.target).split("."))


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _called(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls with one positional tensor, or None."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    called: nn.Module = child(root, _path(node))
    return called


def _zero_channels(node: fx.Node) -> Pair | None:
    """Return how many channels of zeros ``F.pad`` puts before and behind its operand's, if it does nothing else."""
    if node.target is not F.pad or len(node.args) != 2:  # a trace gives the others by name
        return None
    pad: Any = node.args[1]
    if node.kwargs["mode"] != "constant" or node.kwargs["value"] not in (None, 0) or not isinstance(pad, Sequence):
        return None
    if len(pad) != 6 or not all(isinstance(n, int) and n >= 0 for n in pad) or any(pad[:4]):
        return None
    return pad[4], pad[5]


def _strides(node: fx.Node) -> Pair | None:
    """Return the strides of ``x[:, :, ::h, ::w]``."""
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or index[:-2] not in ((slice(None), slice(None)), (...,)):
        return None
    steps: list[Any] = [s.step or 1 for s in index[-2:] if isinstance(s, slice) and s == slice(None, None, s.step)]
    return (steps[0], steps[1]) if len(steps) == 2 and all(isinstance(step, int) for step in steps) else None


def _changes_in_place(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(child(root, _path(node)), "inplace", False))
    name = target_name(node)
    return name.endswith("_") or node.target in IN_PLACE or bool(node.kwargs.get("inplace"))


def _drop_identities(root: nn.Module, graph: fx.Graph) -> tuple[Path, ...]:
    """Take the nn.Identity out of a graph that a chain may run through; return their paths."""
    dropped = []
    for node in list(graph.nodes):
        if type(_called(root, node)) is nn.Identity:
            source = _operand(node)
            before = _called(root, source)
            follows = source.op in ("call_function", "call_method") or type(before) in CHAIN_MODULES or is_norm(before)
            if follows or any(target_name(user) in ADD_FUNCTIONS for user in node.users):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                dropped.append(_path(node))
    return tuple(dropped)


def _is_whole(graph: fx.Graph, chains: list[_Match]) -> bool:
    """Whether a graph is one chain and nothing else."""
    if len(chains) != 1:
        return False
    (match,) = chains
    nodes = set(match.nodes)
    return match.x.op == "placeholder" and all(
        node in nodes or node.op == "placeholder" or (node.op == "output" and node.args[0] is match.end)
        for node in graph.nodes
    )


def _write_forward(graph: fx.Graph, chains: list[_Match]) -> str:
    """Replace every chain in a graph by ``chains.run(i, x, shortcut)`` and write the graph as Python source."""
    x = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(x):
        runner = graph.placeholder("chains")
    replaced: dict[fx.Node, fx.Node] = {}
    for i, match in enumerate(chains):
        shortcut = match.shortcut and replaced.get(match.shortcut, match.shortcut)
        with graph.inserting_after(match.end):
            run = graph.call_method("run", (runner, i, replaced.get(match.x, match.x), shortcut))
        match.end.replace_all_uses_with(run)
        replaced[match.end] = run
        for node in reversed([node for node in graph.nodes if node in match.nodes]):
            graph.erase_node(node)
    code = graph.python_code("self")
    used = {name: value for name, value in code.globals.items() if re.search(rf"\b{name}\b", code.src)}
    return "\n".join([*(_define(name, value) for name, value in used.items()), code.src.strip(), ""])


def _define(name: str, value: Any) -> str:
    """Return the line of source that gives a traced forward one of its globals."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}"
    if isinstance(value, float):  # inf, nan
        return f"{name} = float('{value}')"
    return f"from {value.__module__} import {value.__qualname__} as {name}"
