"""Find the chains in a model by the dataflow of its forwards, swap them in and out, and say what was done and why not.

A module's forward is traced with ``torch.fx``; a chain is conv → batch norm → ReLU with single consumers, repeated, and
perhaps an add with a shortcut, a last ReLU, or a max pool.  No class is known by name: torchvision's blocks, timm's,
Hugging Face's and one's own are found alike.
"""

import re
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fused_resnet import engines
from fused_resnet.blocks import (
    FUNCTION,
    ChainPaths,
    Container,
    FusedModule,
    Path,
    Plan,
    UnitPaths,
    child,
    fused_class,
    is_frozen_norm,
    prepare,
    stock_class,
)
from fused_resnet.chain import IDENTITY

RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
ADD_FUNCTIONS = ("add", "add_", "iadd")
WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule")
# modules that a chain can hold; a forward that reaches any other is never one chain as a whole
CHAIN_MODULES = (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Identity)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class NothingToFuse(UserWarning):
    """No chain was found in the model."""


def fuse(
    model: nn.Module,
    *,
    strict: bool = False,
    chain: str = "auto",
    memory: str = "fast",
    engine: str = "auto",
) -> nn.Module:
    """Swap fused chains of convolution, batch norm, ReLU and residual add into a model, in place.

    Parameters and buffers stay the same objects under the same names; so do the modules, which get a subclass of their
    own class.  Fuse before wrapping: ``fuse`` → DDP or FSDP → ``torch.compile``.

    Parameters
    ----------
    model
        Any module: torchvision's, timm's, Hugging Face's or hand-written networks.
    strict
        Raise where nothing can be fused; the default warns.
    chain
        What one autograd node spans: ``"block"``; ``"auto"`` chooses (today always the block).
    memory
        ``"fast"``.  ``"lean"``, which will recompute more in backward, is refused in this version.
    engine
        ``"auto"``, or the name of one engine, which then must be able to serve (see ``fused-resnet doctor``).

    Returns
    -------
    The same model.

    Raises
    ------
    TypeError
        Where the model is wrapped already, or is no module.
    ValueError
        Where an option is unknown, or with ``strict`` where nothing can be fused.
    fused_resnet.engines.EngineError
        Where the engine asked for by name cannot serve the model's device.

    Examples
    --------
    >>> model = fused_resnet.fuse(torchvision.models.resnet50())
    >>> print(fused_resnet.explain(model))
    """
    _check_model(model)
    if chain not in ("auto", "block"):
        raise ValueError(f"chain must be 'auto' or 'block' (one autograd node for each block), got {chain!r}")
    if memory != "fast":
        lean = ", which this version cannot do yet" if memory == "lean" else ""
        raise ValueError(f"memory must be 'fast', got {memory!r}{lean}; use memory='fast'")
    engines.check_name(engine)
    if engine != "auto":
        for parameter in model.parameters():
            engines.choose(engine, parameter.device.type, parameter.dtype)
    unfuse(model)
    for _, module, plans in list(_survey(model, "", engine)):
        if not isinstance(plans, str):
            module.__class__ = fused_class(type(module))
            module._fused = plans
    report = explain(model)
    if not report.fused:
        message = f"fused_resnet: nothing to fuse in {type(model).__name__}.\n{report}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, NothingToFuse, stacklevel=2)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module its own class back, in place; parameters and buffers are not touched."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.__class__ = stock_class(type(module))
            module.__dict__.pop("_fused", None)
    return model


class Row(NamedTuple):
    """One line of a report: a module, what is fused in it or None, the engine, and why (not)."""

    module: str
    what: str | None
    engine: str
    reason: str


class Report(NamedTuple):
    """What :func:`explain` found; prints as a table."""

    rows: list[Row]

    @property
    def fused(self) -> list[Row]:
        """The rows of chains that are fused."""
        return [row for row in self.rows if row.what is not None]

    @property
    def left(self) -> list[Row]:
        """The rows of what was left stock, with the reason."""
        return [row for row in self.rows if row.what is None]

    def __str__(self) -> str:
        head = f"{len(self.fused)} chains fused, {len(self.left)} places left stock"
        width = max((len(row.module) for row in self.rows), default=0)
        lines = []
        for row in self.rows:
            text = f"{row.what}  [{row.engine}]" if row.what is not None else f"stock: {row.reason}"
            lines.append(f"  {row.module:<{width}}  {text}")
        return "\n".join([head, *lines])


def explain(model: nn.Module) -> Report:
    """Say what is fused in a model, by which engine, and what is left stock and why; printable.

    It looks at the modules as they are now: a hook put on a fused block's convolution is named here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    rows: list[Row] = []
    for name, module, plans in _survey(model, "", "auto"):
        shown = name or f"({type(model).__name__})"
        if isinstance(plans, str):
            rows.append(Row(shown, None, "", plans))
        elif not isinstance(module, FusedModule):
            rows += [Row(shown, None, "", f"{_describe(paths)} could be fused") for paths in plans[True].chains]
        else:
            plan = plans.get(module.training)
            chains = "it was fused in the other mode only" if plan is None else prepare(module, plan)
            if isinstance(chains, str):
                rows.append(Row(shown, None, "", chains))
            else:
                rows += [
                    Row(shown, _describe(paths), _serving_engine(plan.engine, c.parameters), "")
                    for paths, c in zip(plan.chains, chains, strict=True)
                ]
    return Report(rows)


def _serving_engine(engine: str, parameters: list[torch.Tensor]) -> str:
    weight = parameters[0]
    try:
        return engines.choose(engine, weight.device.type, weight.dtype)
    except engines.EngineError as error:
        return str(error)


def _describe(paths: ChainPaths) -> str:
    def unit(u: UnitPaths) -> list[str]:
        act = [] if u.act is None else ["relu" if u.act == FUNCTION else ".".join(u.act)]
        return [".".join(path) for path in (u.conv, u.norm) if path is not None] + act

    *inner, last = paths.units
    words = [word for u in inner for word in unit(u)] + unit(last._replace(act=None))
    if paths.shortcut is not None:
        words.append("+ x" if paths.shortcut == IDENTITY else f"+ ({' '.join(unit(paths.shortcut))})")
    words += unit(last)[len(unit(last._replace(act=None))) :]
    if paths.pool is not None:
        words.append(".".join(paths.pool))
    return " ".join(words)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be a plain module, got a torch.jit.ScriptModule; fuse the model it was made from")
    for cls in type(model).__mro__:
        if cls.__name__ in WRAPPERS and cls.__module__.startswith("torch."):
            raise TypeError(
                f"model is wrapped in {cls.__name__} already; fuse first, then wrap: "
                "model = fused_resnet.fuse(model), then DDP or FSDP, then torch.compile"
            )


# ----------------------------------------------------------------------------------------------------------------------
# the survey: which modules hold chains, top down


def _survey(module: nn.Module, name: str, engine: str) -> Iterator[tuple[str, nn.Module, dict[bool, Plan] | str]]:
    """Yield (name, module, plans or why not) for every module that holds chains or a norm that is in none."""
    if isinstance(module, FusedModule) and "_fused" in module.__dict__:
        plans: dict[bool, Plan] | str = module._fused
    else:
        plans = _plan(module, engine)
    covered: set[Path] = set()
    if not isinstance(plans, str) and plans:
        yield name, module, plans
        covered = {path for plan in plans.values() for path in _covered(plan)}
    elif isinstance(plans, str) and any(isinstance(m, NORMS) or is_frozen_norm(m) for m in module.children()):
        yield name, module, plans
    for child_name, inner in module.named_children():
        yield from _survey_below(inner, (child_name,), covered, name, engine)


def _survey_below(
    module: nn.Module, path: Path, covered: set[Path], name: str, engine: str
) -> Iterator[tuple[str, nn.Module, dict[bool, Plan] | str]]:
    if path in covered or _is_primitive(module):
        return
    full_name = ".".join((*name.split("."), *path) if name else path)
    if any(c[: len(path)] == path for c in covered):
        # a container whose parts are in a chain of its owner's
        for child_name, inner in module.named_children():
            yield from _survey_below(inner, (*path, child_name), covered, name, engine)
    else:
        yield from _survey(module, full_name, engine)


def _covered(plan: Plan) -> Iterator[Path]:
    for chain in plan.chains:
        for unit in (*chain.units, chain.shortcut):
            if isinstance(unit, UnitPaths):
                yield from (path for path in unit if isinstance(path, tuple))
        yield from chain.passed
        if chain.pool is not None:
            yield chain.pool


def _plan(module: nn.Module, engine: str) -> dict[bool, Plan] | str:
    """Return the plans of a module for training and eval; {} where it holds nothing of interest, or why it has none."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not any(True for _ in module.children()):
        return {}
    plans: dict[bool, Plan] = {}
    reasons: list[str] = []
    for training in (True, False):
        plan = _plan_mode(module, training, engine)
        if isinstance(plan, Plan):
            plans[training] = plan
        else:
            reasons.append(plan)
    return plans or reasons[0]


def _plan_mode(module: nn.Module, training: bool, engine: str) -> Plan | str:
    """Return the plan of a module in one mode, or why it has none."""
    leaves = [m for m in module.modules() if _is_primitive(m)]
    whole = all(type(m) in CHAIN_MODULES or isinstance(m, NORMS) or is_frozen_norm(m) for m in leaves)
    if isinstance(module, nn.Sequential) and not all(map(_is_primitive, module)):
        whole = False  # a row of blocks: each is found by itself
    reason = ""
    for deep in (True, False) if whole else (False,):
        try:
            graph, containers = _trace(module, training, deep)
        except Exception as error:  # a tracer meets whatever a forward holds; its error is the reason reported
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = f"its forward cannot be traced: {first_line}"
            continue
        chains = _Matcher(module, graph).chains()
        if not chains or (deep and not _is_whole(graph, chains)):
            reason = "no conv → batch norm → ReLU with single consumers in its forward"
            continue
        paths = tuple(match.paths for match in chains)
        plan = Plan(paths, containers, _write_forward(graph, chains), engine)
        prepared = prepare(module, plan)
        if isinstance(prepared, str):
            reason = prepared
            continue
        return plan
    return reason


def _is_primitive(module: nn.Module) -> bool:
    if is_frozen_norm(module):
        return True
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


# ----------------------------------------------------------------------------------------------------------------------
# the trace of one forward


class _Tracer(fx.Tracer):
    """Trace ``forward(x)``; every other argument keeps its default.

    ``deep`` goes through the module's own children down to torch's layers; otherwise every child is a leaf.
    """

    def __init__(self, deep: bool):
        super().__init__()
        self.deep = deep
        self.entered: dict[str, nn.Module] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = not self.deep or _is_primitive(m)
        if not leaf:
            self.entered[module_qualified_name] = m
        return leaf


def _trace(module: nn.Module, training: bool, deep: bool) -> tuple[fx.Graph, tuple[Container, ...]]:
    modes = {m: m.training for m in module.modules() if not _is_primitive(m)}
    try:
        for m in modes:
            m.training = training
        tracer = _Tracer(deep)
        graph = tracer.trace(module)
    finally:
        for m, mode in modes.items():
            m.training = mode
    entered = {"": module, **tracer.entered}
    return graph, tuple(_container(tuple(filter(None, name.split("."))), m) for name, m in entered.items())


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _container(path: Path, module: nn.Module) -> Container:
    children = tuple(module._modules)
    missing = tuple(name for name in children if module._modules[name] is None)
    attributes = tuple(
        (name, value)
        for name, value in vars(module).items()
        if name not in _MODULE_ATTRIBUTES and isinstance(value, (bool, int, float, str, type(None)))
    )
    return Container(path, type(module), children, missing, attributes)


# ----------------------------------------------------------------------------------------------------------------------
# matching chains in a graph


class _Match(NamedTuple):
    paths: ChainPaths
    x: fx.Node
    shortcut: fx.Node | None
    nodes: list[fx.Node]
    end: fx.Node


class _Walk(NamedTuple):
    """A row of units before it is known what it ends in."""

    units: list[UnitPaths]
    x: fx.Node
    nodes: list[fx.Node]
    passed: list[Path]
    end: fx.Node


class _Matcher:
    """Finds chains in the graph of one forward."""

    def __init__(self, root: nn.Module, graph: fx.Graph):
        self.root = root
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        called = [node.target for node in graph.nodes if node.op == "call_module"]
        # a module that is called twice shares its parameters between two places of one chain, or of two
        self.shared = {target for target in called if called.count(target) > 1}

    def chains(self) -> list[_Match]:
        """Return the chains, in the order in which they end; no node is in two."""
        walks: list[_Walk] = []
        taken: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node not in taken and (walk := self._walk(node)):
                walks.append(walk)
                taken.update(walk.nodes)
        matches: list[_Match] = []
        used: set[int] = set()
        by_end = {walk.end: walk for walk in walks}
        for walk in sorted(walks, key=lambda w: -len(w.units)):
            if id(walk) in used:
                continue
            match, projection = self._finish(walk, by_end, used)
            if match is None:
                continue
            used.add(id(walk))
            if projection is not None:
                used.add(id(projection))
            matches.append(match)
        return sorted(matches, key=lambda match: self.order[match.end])

    def _walk(self, node: fx.Node) -> _Walk | None:
        """The longest row of units that starts at a node."""
        units: list[UnitPaths] = []
        nodes: list[fx.Node] = []
        passed: list[Path] = []
        x = None
        end = None
        while True:
            conv = norm = None
            seen = [node]
            if self._is_conv(node):
                conv = node
                norm = self._next(node, seen)
            elif not units:
                norm = node
            if norm is None or not self._is_norm(norm):
                break
            act, after = None, [*seen]
            follower = self._next(norm, after)
            if follower is not None and self._is_relu(follower):
                act, seen = follower, after
            if x is None:
                x = node.args[0] if node.args else None
                if not isinstance(x, fx.Node):
                    return None
            units.append(UnitPaths(conv and self._path(conv), self._path(norm), act and self._act_path(act)))
            members = [n for n in (conv, norm, act) if n is not None]
            passed += [self._path(n) for n in seen if self._calls(n, nn.Identity)]
            nodes += [*members, *(n for n in seen if n not in members)]
            end = act or norm
            follower = self._next(end, ahead := [])
            if follower is None or not self._is_conv(follower):
                break
            norm_ahead = self._next(follower, [])
            if norm_ahead is None or not self._is_norm(norm_ahead):
                break
            passed += [self._path(n) for n in ahead if self._calls(n, nn.Identity)]
            nodes += [n for n in ahead if self._calls(n, nn.Identity)]
            node = follower
        return _Walk(units, x, nodes, passed, end) if units else None

    def _finish(
        self, walk: _Walk, by_end: dict[fx.Node, _Walk], used: set[int]
    ) -> tuple[_Match | None, _Walk | None]:
        """What a row of units ends in: an add and its ReLU, a max pool, or nothing."""
        units, nodes, passed, end = list(walk.units), list(walk.nodes), list(walk.passed), walk.end
        shortcut_paths: UnitPaths | str | None = None
        shortcut: fx.Node | None = None
        projection: _Walk | None = None
        pool: Path | None = None
        ahead: list[fx.Node] = []
        follower = self._next(end, ahead)
        if follower is not None and units[-1].act is None and (other := self._other_operand(follower, [end, *ahead][-1])):
            source = other
            side: list[fx.Node] = []
            while self._calls(source, nn.Identity) and len(source.users) == 1:
                side.append(source)
                source = source.args[0]
            candidate = by_end.get(source)
            if candidate is not None and candidate is not walk and id(candidate) not in used and (
                len(candidate.units) == 1 and candidate.units[0].act is None and candidate.units[0].conv is not None
            ):
                projection = candidate
                shortcut_paths, shortcut = candidate.units[0], candidate.x
                nodes += candidate.nodes
                passed += candidate.passed
            elif self._is_inplace_add(follower, other):
                return None, None  # it would change a tensor that others see
            else:
                shortcut_paths, shortcut = IDENTITY, source
            nodes += [*ahead, *side]
            passed += [self._path(n) for n in (*ahead, *side) if self._calls(n, nn.Identity)]
            end = follower
            nodes.append(end)
            relu = self._next(end, ahead := [])
            if relu is not None and self._is_relu(relu):
                nodes += [*ahead, relu]
                passed += [self._path(n) for n in ahead if self._calls(n, nn.Identity)]
                units[-1] = units[-1]._replace(act=self._act_path(relu))
                end = relu
        elif follower is not None and self._calls(follower, nn.MaxPool2d) and units[-1].conv is not None:
            pool = self._path(follower)
            nodes += [*ahead, follower]
            passed += [self._path(n) for n in ahead if self._calls(n, nn.Identity)]
            end = follower
        if len(units) == 1 and units[0].conv is None and units[0].act is None and shortcut_paths is None:
            return None, None  # a batch norm alone
        if self._input_is_changed(walk.x, shortcut, nodes, end):
            return None, None
        paths = ChainPaths(tuple(units), shortcut_paths, pool, tuple(dict.fromkeys(passed)))
        return _Match(paths, walk.x, None if shortcut is walk.x else shortcut, nodes, end), projection

    def _next(self, node: fx.Node, seen: list[fx.Node]) -> fx.Node | None:
        """The only consumer of a node's value, through nn.Identity; ``seen`` gets the nodes on the way."""
        while len(node.users) == 1:
            (follower,) = node.users
            if follower.op == "output":
                return None
            if not self._calls(follower, nn.Identity):
                return follower
            seen.append(follower)
            node = follower
        return None

    def _calls(self, node: fx.Node, cls: type) -> bool:
        return (
            node.op == "call_module"
            and type(child(self.root, self._path(node))) is cls
            and len(node.args) == 1
            and not node.kwargs
        )

    def _is_conv(self, node: fx.Node) -> bool:
        return self._calls(node, nn.Conv2d) and node.target not in self.shared

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op != "call_module" or node.target in self.shared:
            return False
        norm = child(self.root, self._path(node))
        return type(norm) is nn.BatchNorm2d or is_frozen_norm(norm)

    def _is_relu(self, node: fx.Node) -> bool:
        function = node.op in ("call_function", "call_method") and node.target in RELU_FUNCTIONS
        return function or self._calls(node, nn.ReLU)

    def _other_operand(self, node: fx.Node, main: fx.Node) -> fx.Node | None:
        """What a node adds to ``main``, or None where it does not add two different tensors."""
        if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
            return None
        if _target_name(node) not in ADD_FUNCTIONS:
            return None
        other = node.args[1] if node.args[0] is main else node.args[0]
        return other if isinstance(other, fx.Node) and other is not main else None

    def _is_inplace_add(self, add: fx.Node, other: fx.Node) -> bool:
        return _target_name(add) in ("iadd", "add_") and add.args[0] is other

    def _input_is_changed(
        self, x: fx.Node, shortcut: fx.Node | None, nodes: list[fx.Node], end: fx.Node
    ) -> bool:
        """Whether something outside changes an input in place before the chain, which runs at its end, reads it."""
        return any(
            user not in nodes and self.order[user] < self.order[end] and self._is_inplace(user)
            for source in (x, shortcut)
            if source is not None
            for user in source.users
        )

    def _is_inplace(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(child(self.root, self._path(node)), "inplace", False))
        name = _target_name(node)
        return name.endswith("_") or name in ("iadd", "isub", "imul") or bool(node.kwargs.get("inplace"))

    def _path(self, node: fx.Node) -> Path:
        return tuple(str(node.target).split("."))

    def _act_path(self, node: fx.Node) -> Path | str:
        return self._path(node) if node.op == "call_module" else FUNCTION


def _target_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


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
    imports = [
        f"import {value.__name__} as {name}"
        if isinstance(value, ModuleType)
        else f"from {value.__module__} import {value.__qualname__} as {name}"
        for name, value in code.globals.items()
        if re.search(rf"\b{name}\b", code.src)
    ]
    return "\n".join([*imports, code.src.strip(), ""])
