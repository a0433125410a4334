"""Where the modules of a fused module's chains are, and what the trace of its forward took for granted."""

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.chain.spec import Padded
from fused_resnet.ops.activation import RELU, Act

Path = tuple[str, ...]
Reads = tuple[tuple[tuple[str, ...], Any], ...]  # names, and what was read there, as guards.frozen copies it


# what a forward's argument was taken for when it was traced: VALUE is anything, as nothing was asked of it
TENSOR, TENSORS, VALUE = "a tensor", "a list of tensors", "a value"


class UnitPaths(NamedTuple):
    """Where a unit's modules are, from the fused module down; an activation that is a function is that itself."""

    conv: Path | None
    norm: Path
    act: Path | Act | None

    @property
    def is_norm_act(self) -> bool:
        """Whether the norm's module applies the activation, too."""
        return self.act is not None and not isinstance(self.act, Act) and self.act[:-1] == self.norm


class BlockPaths(NamedTuple):
    """Where the modules of a chain's block are; ``shortcut`` is None, IDENTITY, padded or a projection."""

    units: tuple[UnitPaths, ...]
    shortcut: UnitPaths | Padded | str | None
    pool: Path | None
    adds_in_place: bool = False

    @property
    def modules(self) -> tuple[Path, ...]:
        """The paths of all modules that the block runs."""
        units = [unit for unit in (*self.units, self.shortcut) if isinstance(unit, UnitPaths)]
        paths = [path for unit in units for path in unit if path is not None and not isinstance(path, Act)]
        return (*paths, *([] if self.pool is None else [self.pool]))


ChainPaths = tuple[BlockPaths, ...]


class Container(NamedTuple):
    """What the trace of a forward took for granted in a module that it went through; ``attributes`` from there down."""

    path: Path
    cls: type[nn.Module]
    children: tuple[str, ...]
    missing: tuple[str, ...]
    attributes: Reads


@dataclass(frozen=True)
class Plan:
    """How to run a module's forward with chains in it.

    Attributes
    ----------
    chains
        The chains, in the order in which they run.
    containers
        What must still be as it was when the forward was traced.
    identities
        The nn.Identity, and the dropouts without an effect, that were left out of the source.
    source
        Python source of ``forward(self, chains, x)``, written from the trace: the module's own forward, with
        ``chains.run(i, x, shortcut)`` in the place of each chain.
    options
        Engine and memory: a plain tuple of what :class:`fused_resnet.chain.spec.Options` names.
    globals
        What the functions that ran read of their modules: a module's name, and a name in it.
    left
        Why norms among the module's children are in no chain, by name.
    kinds, names
        What the forward's arguments were taken for, and what they are called.
    others
        Plans for calls with other arguments.
    """

    chains: tuple[ChainPaths, ...]
    containers: tuple[Container, ...]
    identities: tuple[Path, ...]
    source: str
    options: tuple[str, str]
    globals: Reads = ()
    left: dict[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = (TENSOR,)
    names: tuple[str, ...] = ()
    others: tuple["Plan", ...] = ()
    forward: Callable[..., Any] = field(init=False, repr=False, compare=False)
    functions: tuple[Any, ...] = field(init=False, repr=False, compare=False)  # that it calls, and their bodies
    forwards: tuple[Any, ...] = field(init=False, repr=False, compare=False)  # of the containers' classes

    def __post_init__(self) -> None:
        namespace: dict[str, Any] = {}
        exec(compile(self.source, "<fused_resnet forward>", "exec"), namespace)
        object.__setattr__(self, "forward", namespace["forward"])
        reads = (self.globals, *(container.attributes for container in self.containers))
        functions = (v for _, v in itertools.chain(*reads) if isinstance(v, FunctionType))
        object.__setattr__(
            self, "functions", tuple((f, *body_of(f)) for f in functions if not f.__module__.startswith("torch"))
        )
        forwards = tuple(container.cls.forward for container in self.containers)
        object.__setattr__(self, "forwards", forwards)

    @property
    def modules(self) -> list[Path]:
        """The paths of all modules that the chains run."""
        return [path for chain in self.chains for block in chain for path in block.modules]

    def serving(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "tuple[Plan, Sequence[Any]] | None":
        """Return the plan for a call, and the call's arguments in order, or None."""
        for plan in (self, *self.others):
            named = plan.names[len(args) :]
            if len(args) + len(kwargs) == len(plan.kinds) and all([name in kwargs for name in named]):  # noqa: C419
                given = [*args, *[kwargs[name] for name in named]]
                if all([_is(kind, value) for kind, value in zip(plan.kinds, given, strict=True)]):  # noqa: C419 (Dynamo)
                    return plan, given
        return None

    def __reduce__(self) -> Any:
        containers = tuple(c._replace(attributes=_without_references(c.attributes)) for c in self.containers)
        of_modules = _without_references(self.globals)
        of_calls = self.left, self.kinds, self.names, self.others
        return _restore_plan, (
            self.chains,
            containers,
            self.identities,
            self.source,
            self.options,
            of_modules,
            *of_calls,
        )


def _is(kind: str, value: Any) -> bool:
    """Whether an argument is what it was taken for."""
    if kind == TENSORS:
        return type(value) is list and len(value) > 0 and all([isinstance(v, Tensor) for v in value])  # noqa: C419
    if isinstance(value, Tensor):
        return torch.compiler.is_compiling() or type(value) in (Tensor, nn.Parameter)
    return kind == VALUE


REFERENCES = (FunctionType, BuiltinFunctionType, ModuleType, type)
AS_LOADED = "as it is where the plan is loaded"


def _without_references(reads: Reads) -> Reads:
    """Return reads whose functions, classes and modules are looked up again where a pickle is loaded."""
    return tuple((names, AS_LOADED if isinstance(value, REFERENCES) else value) for names, value in reads)


def _with_references(reads: Reads, find: Callable[[tuple[str, ...]], Any]) -> Reads:
    return tuple((names, find(names) if value == AS_LOADED else value) for names, value in reads)


def _restore_plan(
    chains: Any,
    containers: tuple[Container, ...],
    identities: Any,
    source: str,
    options: Any,
    of_modules: Reads,
    *of_calls: Any,
) -> Plan:
    def of_class(container: Container) -> Container:
        reads = _with_references(container.attributes, lambda names: getattr(container.cls, names[-1], None))
        return container._replace(attributes=reads)

    of_modules = _with_references(of_modules, lambda names: vars(importlib.import_module(names[0])).get(names[1]))
    chains = tuple(tuple(_with_its_relu(block) for block in chain) for chain in chains)
    return Plan(chains, tuple(map(of_class, containers)), identities, source, options, of_modules, *of_calls)


def _with_its_relu(block: BlockPaths) -> BlockPaths:
    """Name the activations of an earlier commit, which knew one that is a function, by no name of its own."""
    units: Any = block.units
    return block._replace(units=tuple(u._replace(act=RELU) if u.act == "function" else u for u in units))


def body_of(function: FunctionType) -> tuple[Any, ...]:
    """Return what a function does: its code and its defaults."""
    return function.__code__, function.__defaults__, function.__kwdefaults__ and tuple(function.__kwdefaults__.items())
