"""The fusion rules: which nodes of a forward's graph are a chain.

A chain is conv → batch norm → ReLU with single consumers, repeated, and perhaps an add with a shortcut, a last ReLU, or
a max pool.  No class is known by name: torchvision's blocks, timm's, Hugging Face's and one's own are found alike.
"""

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet.blocks.activations import MODULES as ACTIVATIONS
from fused_resnet.blocks.activations import act_of_call, act_of_module
from fused_resnet.blocks.frozen import is_frozen_norm
from fused_resnet.blocks.fusion import fusion_of
from fused_resnet.blocks.layers import (
    CONVOLUTIONS,
    child,
    is_batch_norm,
    is_inert,
    is_norm_act,
)
from fused_resnet.blocks.plan import BlockPaths, ChainPaths, Path, UnitPaths
from fused_resnet.blocks.refusals import why_not_act, why_not_conv, why_not_pool
from fused_resnet.blocks.subclasses import layer_class
from fused_resnet.chain.spec import IDENTITY, NOT_PADDED, Padded, Pair
from fused_resnet.ops.activation import Act
from fused_resnet.tracing.trace import is_primitive
from fused_resnet.tracing.values import IN_PLACE, target_name

ADD_FUNCTIONS = ("add", "add_", "iadd")
# modules that a chain can hold; a forward that reaches any other is never one chain as a whole
CHAIN_MODULES = (*CONVOLUTIONS, *ACTIVATIONS, nn.MaxPool2d, nn.Identity)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def is_chain_module(module: nn.Module | None) -> bool:
    """Whether a module is a layer, not a norm, that a chain can hold."""
    return module is not None and (layer_class(module) in CHAIN_MODULES or act_of_module(module) is not None)


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a normalisation layer of any kind."""
    return isinstance(module, NORMS) or (module is not None and is_frozen_norm(module))


class _Unit(NamedTuple):
    conv: fx.Node | None
    norm: fx.Node
    act: fx.Node | None  # the norm itself, where that applies it

    @property
    def nodes(self) -> list[fx.Node]:
        nodes = [node for node in self if node is not None]
        return nodes[:-1] if self.act is self.norm else nodes

    @property
    def x(self) -> fx.Node:
        return _operand(self.conv or self.norm)

    @property
    def end(self) -> fx.Node:
        return self.act or self.norm


class Match(NamedTuple):
    """A chain in a graph: where its modules are, what it reads, its nodes, and the last of them."""

    paths: ChainPaths
    x: fx.Node
    shortcut: fx.Node | None  # where it is not x
    nodes: list[fx.Node]
    end: fx.Node

    @property
    def is_unit(self) -> bool:
        """Whether it is a single unit and nothing else."""
        (block, *others) = self.paths
        return not others and len(block.units) == 1 and block.shortcut is None and block.pool is None


class Matcher:
    """Finds the chains in the graph of one forward."""

    def __init__(self, root: nn.Module, graph: fx.Graph):
        self.root = root
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        # a convolution or norm called twice would need its gradient from two places
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.shared = {target for target, count in calls.items() if count > 1}
        self.adds: set[fx.Node] = set()  # that a chain ends in; the other branch's does not

    def matches(self) -> list[Match]:
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

    def changes_an_argument(self) -> bool:
        """Whether any node writes into what the forward was given."""
        given = [node for node in self.order if node.op == "placeholder"]
        return any(_changes_in_place(self.root, user) for node in given for user in node.users)

    def strangers(self) -> list[Path]:
        """Return the children beside a norm that the trace did not go into and that have no norms of their own."""
        found = []
        for node in self.order:
            unit = self._unit(node) if self._is_norm(node) else None
            if unit is not None:
                neighbours = [unit.x, *([self._consumer(node)] if unit.act is None else [])]
                found += [_path(n) for n in neighbours if n is not None and self._is_stranger(n)]
        return list(dict.fromkeys(found))

    def children_with_a_norm(self) -> list[Path]:
        """Return the children that have one norm and that the trace did not go into."""
        called = [(node, child(self.root, _path(node))) for node in self.order if node.op == "call_module"]
        return [
            _path(node)
            for node, inner in called
            if not is_primitive(inner) and fusion_of(inner) is None and sum(map(is_norm, inner.modules())) == 1
        ]

    def _is_stranger(self, node: fx.Node) -> bool:
        called = child(self.root, _path(node)) if node.op == "call_module" else None
        if called is None or is_primitive(called) or fusion_of(called) is not None:
            return False
        return not any(map(is_norm, called.modules()))

    def why_left(self, names: Sequence[str]) -> dict[str, str]:
        """Return why children that are norms are in no chain, by name, as far as the graph shows it."""
        calls = {str(node.target): node for node in self.order if node.op == "call_module"}
        reasons = {}
        for name in names:
            norm = child(self.root, (name,))
            if not is_batch_norm(norm):
                reasons[name] = f"{name} is a {type(norm).__name__}, not a batch norm"
            elif name in calls:
                reasons[name] = f"{name} {self._why_alone(calls[name])}"
        return reasons

    def _why_alone(self, norm: fx.Node) -> str:
        """Say what keeps a batch norm out of a chain: what is in front of it, and what is behind."""
        if norm.target in self.shared:
            return "is called more than once"
        called = _called(self.root, norm)
        if called is None or (reason := _why_not_norm_act(called)):
            return "has more than one argument" if called is None else f"is a {type(called).__name__}; {reason}"
        source, behind = _operand(norm), self._consumer(norm)
        front = f"follows {self._words(source)}" + (", which others read, too" if len(source.users) > 1 else "")
        if len(norm.users) > 1:
            return f"{front}, and several read what it gives"
        return f"{front}, and {'nothing' if behind is None else self._words(behind)} follows it"

    def _words(self, node: fx.Node) -> str:
        """Name what a node does: a module's class, a function, or the forward's input."""
        if node.op == "call_module":
            return f"a {type(child(self.root, _path(node))).__name__}"
        return "the input" if node.op == "placeholder" else target_name(node) or node.op

    def knows_all(self) -> bool:
        """Whether a chain can hold every node of the graph, but for children that a trace may yet go into."""
        return all(
            node.op in ("placeholder", "output")
            or (node.op == "call_module" and not is_primitive(child(self.root, _path(node))))
            or is_chain_module(_called(self.root, node))
            or self._is_norm(node)
            or self._act(node) is not None
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
        called = _called(self.root, node)
        is_conv = called is not None and why_not_conv(called, ()) is None
        conv = node if is_conv and node.target not in self.shared else None
        norm = node if conv is None else self._consumer(conv)
        if norm is None or not self._is_norm(norm) or norm.target in self.shared:
            return None
        act = norm if _has_act(_called(self.root, norm)) else self._consumer(norm)
        return _Unit(conv, norm, act if act is norm or (act is not None and self._act(act)) else None)

    def _match(self, row: list[_Unit], rows: dict[fx.Node, list[_Unit]]) -> Match | None:
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
            act = self._consumer(end)
            if act is not None and self._act(act):
                nodes.append(act)
                units[-1] = units[-1]._replace(act=self._act_path(act))
                end = act
        elif consumer is not None and self._pools(consumer):
            nodes.append(consumer)
            end = pool = consumer
        elif len(nodes) == 1 and row[0].act is None:
            return None  # a batch norm alone
        if self._is_changed_before(end, x, nodes) or (shortcut and self._is_changed_before(end, shortcut, nodes)):
            return None
        in_place = shortcut_paths is not None and _changes_in_place(self.root, consumer or end)
        paths = BlockPaths(tuple(units), shortcut_paths, None if pool is None else _path(pool), in_place)
        return Match((paths,), x, None if shortcut is x else shortcut, nodes, end)

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
            (*_path(unit.norm), "act") if unit.act is unit.norm else self._act_path(unit.act),
        )

    def _act_path(self, node: fx.Node | None) -> Path | Act | None:
        return None if node is None else _path(node) if node.op == "call_module" else self._act(node)

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
        return called is not None and is_batch_norm(called) and _why_not_norm_act(called) is None

    def _act(self, node: fx.Node) -> Act | None:
        """Return the activation that a node applies, or None."""
        if node.op in ("call_function", "call_method"):
            return act_of_call(node.target, node.args[1:], node.kwargs)
        called = _called(self.root, node)
        return None if called is None else act_of_module(called)

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
        writes = node is not None and _changes_in_place(self.root, node) and node.args[0] is operand
        return writes and not (len(operand.users) == 1 and _is_fresh(operand))

    def _is_changed_before(self, end: fx.Node, x: fx.Node, nodes: list[fx.Node]) -> bool:
        """Whether anything else changes ``x`` in place before the chain, which runs at its end, reads it."""
        return any(
            user not in nodes and self.order[user] < self.order[end] and _changes_in_place(self.root, user)
            for user in x.users
        )


def joined(matches: list[Match]) -> list[Match]:
    """Join every chain to the one that it follows."""
    joined: list[Match] = []
    for match in matches:
        front = joined[-1] if joined else None
        if front is not None and _follows(match, front):
            paths, nodes = front.paths + match.paths, front.nodes + match.nodes
            joined[-1] = Match(paths, front.x, front.shortcut, nodes, match.end)
        else:
            joined.append(match)
    return joined


def _follows(match: Match, front: Match) -> bool:
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


def _is_fresh(node: fx.Node) -> bool:
    """Whether a node gives a tensor of its own, which nobody else holds: the sum of two others."""
    return node.op == "call_function" and node.target in (operator.add, torch.add)


def _changes_in_place(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(child(root, _path(node)), "inplace", False))
    name = target_name(node)
    return name.endswith("_") or node.target in IN_PLACE or bool(node.kwargs.get("inplace"))


def _has_act(norm: Any) -> bool:
    """Whether a norm of timm's applies an activation, too."""
    return norm is not None and is_norm_act(norm) and not is_inert(norm.act)


def _why_not_norm_act(norm: Any) -> str | None:
    """Return why a norm of timm's is not in a chain, or None."""
    if not is_norm_act(norm):
        return None
    if not is_inert(norm.drop):
        return f"its drop is a {type(norm.drop).__name__}"
    return None if is_inert(norm.act) else why_not_act(norm.act, ("act",))


def drop_identities(root: nn.Module, graph: fx.Graph) -> tuple[Path, ...]:
    """Take what has no effect out of a graph that a chain may run through; return the paths, and those inside norms."""
    dropped = []
    for node in list(graph.nodes):
        called = _called(root, node)
        if called is not None and is_norm_act(called):
            dropped += [(*_path(node), name) for name in ("drop", "act") if is_inert(getattr(called, name))]
        if called is not None and is_inert(called):
            source = _operand(node)
            before = _called(root, source)
            follows = source.op in ("call_function", "call_method") or is_chain_module(before) or is_norm(before)
            if follows or any(target_name(user) in ADD_FUNCTIONS for user in node.users):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                dropped.append(_path(node))
    return tuple(dropped)


def is_whole(graph: fx.Graph, chains: list[Match]) -> bool:
    """Whether a graph is one chain and nothing else."""
    if len(chains) != 1:
        return False
    (match,) = chains
    nodes = set(match.nodes)
    return match.x.op == "placeholder" and all(
        node in nodes or node.op == "placeholder" or (node.op == "output" and node.args[0] is match.end)
        for node in graph.nodes
    )
