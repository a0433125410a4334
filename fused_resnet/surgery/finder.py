"""Find how the forwards of a model's modules can run with chains in them."""

import contextlib
import dataclasses
import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from fused_resnet.blocks.fusion import fusion_of
from fused_resnet.blocks.guards import why_not_as_traced
from fused_resnet.blocks.layers import child, is_inert
from fused_resnet.blocks.plan import TENSOR, TENSORS, VALUE, Container, Path, Plan
from fused_resnet.blocks.prepare import prepare
from fused_resnet.blocks.refusals import why_not_conv, why_not_pool
from fused_resnet.surgery.rewrite import write_forward
from fused_resnet.surgery.rules import Matcher, drop_identities, is_chain_module, is_norm, is_whole, joined
from fused_resnet.tracing.trace import is_primitive, trace

Place = tuple[str, nn.Module, dict[bool, Plan] | str]  # a module's name, and its plans or why it has none


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
    is_unit
        Whether it is a convolution, a norm and an activation, or some of them, and nothing else.
    """

    containers: tuple[Container, ...]
    plan: Plan | str
    traced: bool = True
    may_be_part: bool = False
    is_unit: bool = False


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
        with_modes = [m for m in module.modules() if not is_primitive(m) or isinstance(m, _DropoutNd)]
        found: dict[bool, Plan | str] = {}
        for training in (True, False):
            with _in_mode(with_modes, training):
                found[training] = self._plan(module, _shape(module), training)
        plans = {training: plan for training, plan in found.items() if isinstance(plan, Plan)}
        return plans or str(found[True])

    def _plan(self, module: nn.Module, shape: Hashable, training: bool) -> Plan | str:
        """Return the plan of a module in the mode that it is in, with those for other arguments, or why it has none."""
        reason = ""
        found: list[Plan] = []
        for arguments in ways_to_call(type(module)):
            if found and len(arguments) == len(found[-1].kinds) and TENSORS not in arguments.values():
                continue  # one that takes any value is there
            plan = self._plan_of_call(module, shape, training, arguments)
            if isinstance(plan, Plan):
                found.append(plan)
            elif not found and len(arguments) > 1 and VALUE in arguments.values():
                reason = plan
            elif not found:
                return reason or plan
        main, *others = found
        return dataclasses.replace(main, others=tuple(others)) if others else main

    def _plan_of_call(
        self, module: nn.Module, shape: Hashable, training: bool, arguments: Mapping[str, str]
    ) -> Plan | str:
        reason = ""
        for deep in (True, False):
            try:
                if deep and (all(map(is_primitive, module.children())) or not self._may_be_part(module, training)):
                    continue
                plan = self._find(module, shape, deep, arguments).plan
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
            return is_chain_module(module) or is_norm(module)
        if fusion_of(module) is not None:
            return False
        if (module, training) not in self._parts:
            part = all(self._may_be_part(inner, training) for inner in module.children())
            if part and type(module).forward is not nn.Module.forward:
                shape = _shape(module)
                found = self._find(module, shape, deep=False)
                part = (found if found.traced else self._find(module, shape, deep=True)).may_be_part
            self._parts[module, training] = part
        return self._parts[module, training]

    def _find(
        self, module: nn.Module, shape: Hashable, deep: bool, arguments: Mapping[str, str] | None = None
    ) -> _Found:
        if arguments is None:
            arguments = next(ways_to_call(type(module)))
        known = self._known.setdefault((shape, deep, *arguments.items()), [])
        for found in known:
            if not any(why_not_as_traced(module, container) for container in found.containers):
                return found
        known.append(self._trace(module, deep, arguments))
        return known[-1]

    def _trace(self, module: nn.Module, deep: bool, arguments: Mapping[str, str]) -> _Found:
        """Find the chains of a forward; the reason is empty where a deep trace shows what the children's own will."""
        traced = trace(module, deep, (), arguments)
        if traced.graph is None:
            return _Found(traced.containers, _untraceable(traced.refused), traced=False)
        graph, identities = traced.graph, drop_identities(module, traced.graph)
        matcher = Matcher(module, graph)
        through: list[Path] = []
        if not deep:
            through += [path for path in matcher.strangers() if self._is_traceable(module, path)]
            through += [path for path in matcher.children_with_a_norm() if self._is_unit(module, path)]
        if through and (further := trace(module, deep, through, arguments)).graph is not None:
            traced, graph, identities = further, further.graph, drop_identities(module, further.graph)
            matcher = Matcher(module, graph)
        containers = traced.containers
        if len(arguments) > 1 and matcher.changes_an_argument():
            return _Found(containers, _untraceable("it changes an argument in place, which may be another one, too"))
        may_be_part = matcher.knows_all()
        matches = matcher.matches()
        if self.stages:
            matches = joined(matches)
        whole = is_whole(graph, matches)
        is_unit = whole and matches[0].is_unit
        of_children = {path[0] for match in matches for block in match.paths for path in block.modules}
        if deep and (not whole or len(of_children) == 1):
            return _Found(containers, "", may_be_part=may_be_part, is_unit=is_unit)
        paths = tuple(match.paths for match in matches)
        fused = {path for chain in paths for block in chain for path in block.modules}
        norms = [name for name, inner in module.named_children() if is_norm(inner) and (name,) not in fused]
        left = matcher.why_left(norms)
        if not matches:
            return _Found(containers, next(iter(left.values()), NO_NORM), may_be_part=may_be_part)
        source = write_forward(graph, matches)
        calls = tuple(arguments.values()), tuple(arguments)
        plan = Plan(paths, containers, identities, source, self.options, traced.globals, left, *calls)
        return _Found(containers, plan, may_be_part=may_be_part, is_unit=is_unit)

    def _is_unit(self, module: nn.Module, path: Path) -> bool:
        """Whether a child is one unit of a chain, which its neighbours may go on."""
        inner = child(module, path)
        return self._find(inner, _shape(inner), deep=not all(map(is_primitive, inner.children()))).is_unit

    def _is_traceable(self, module: nn.Module, path: Path) -> bool:
        """Whether the forward of a child can be gone through."""
        stranger = child(module, path)
        return self._find(stranger, _shape(stranger), deep=True).traced


NO_NORM = "no batch norm of its own in its forward"


def ways_to_call(cls: type[nn.Module]) -> Iterator[dict[str, str]]:
    """Yield the arguments that a forward is traced with, by name what each is taken for.

    Those that it needs come first; then with one and two that it can do without, and with a list of tensors where it
    may take one.  What is asked whether it is None is a tensor in one of two: a value of any kind cannot be asked.
    """
    forward: Any = cls.forward
    try:
        _, *parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        parameters = []
    parameters = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [p.name for p in parameters] or ["x"]
    needed = max(1, sum(p.default is p.empty for p in parameters))
    for count in range(needed, min(needed + 2, len(names)) + 1):
        first, *others = names[:count]
        for kind in (VALUE, TENSOR)[: 2 if others else 1]:
            yield {first: TENSOR, **dict.fromkeys(others, kind)}
    if _may_take_list(forward):
        first, *others = names[:needed]
        yield {first: TENSORS, **dict.fromkeys(others, VALUE)}


def _may_take_list(forward: Any) -> bool:
    """Whether a forward says that it takes a list, asks what it was given, or hands it to what takes one."""
    code = inspect.unwrap(forward).__code__
    annotated = " ".join(map(str, getattr(forward, "__annotations__", {}).values())).lower()
    return "list" in annotated or not {"isinstance", "cat", "concat"}.isdisjoint(code.co_names)


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
            unlike = type(m) is nn.MaxPool2d and why_not_pool(m, ()), isinstance(m, _ConvNd) and why_not_conv(m, ())
            kind = bool(getattr(m, "inplace", False)), is_inert(m), *unlike
            return type(m), kind, tuple(look(inner) for inner in m._modules.values())
        return type(m), tuple((name, look(inner)) for name, inner in m._modules.items())

    return look(module)


def places(model: nn.Module, finder: Finder) -> Iterator[Place]:
    """Yield, top down, (name, module, plans or why not) for every module that has chains, or norms and no chains.

    What is inside a chain in both modes is left out, unless it is a stage that cannot serve as it is now.
    """
    in_chains: set[str] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        inside = name in in_chains or (name and any(path.startswith(prefix) for path in in_chains))
        if inside or is_primitive(module) or not any(True for _ in module.children()):
            continue
        fusion = fusion_of(module)
        plans = finder.plans(module) if fusion is None else fusion.plans
        if not isinstance(plans, str):
            yield name, module, plans
            if not (spans_blocks(plans) and any(isinstance(prepare(module, plan), str) for plan in plans.values())):
                in_chains |= {prefix + ".".join(path) for path in in_both_modes(plans)}
        elif any(is_norm(inner) for inner in module.children()):
            yield name, module, plans


def in_both_modes(plans: dict[bool, Plan]) -> set[Path]:
    """Return the paths of the modules that chains run in training and in eval: of the others, each may have its own."""
    return set.intersection(*({*plan.modules} for plan in plans.values())) if len(plans) == 2 else set()


def spans_blocks(plans: dict[bool, Plan] | str) -> bool:
    """Whether any chain has more than one block."""
    return not isinstance(plans, str) and any(len(chain) > 1 for plan in plans.values() for chain in plan.chains)
