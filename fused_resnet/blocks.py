"""What a fused module is: its own class, with a mixin in front whose forward runs chains where it can.

A module is fused by assigning a subclass of its own class to ``__class__`` and leaving a :class:`Plan` in its
``__dict__``; parameters, buffers, children, hooks and keys stay what they were.  Every call looks at the children
afresh, and any call that a chain does not serve is ``super().forward(x)``: stock.

Everything in :meth:`FusedModule.forward` is also traced by ``torch.compile``; it is written in what Dynamo can follow.
"""

import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fused_resnet.chain_ops import run_chain, update_running_stats_
from fused_resnet.chain_spec import Padded, is_projection
from fused_resnet.checkpointing import is_recomputation
from fused_resnet.provable import ABSENT, same
from fused_resnet.snapshot import Snapshot
from fused_resnet.synchronized import group_name

Path = tuple[str, ...]
Signature = tuple[Any, ...]

FUNCTION = "function"
Reads = tuple[tuple[tuple[str, ...], Any], ...]  # names, and what was read there, as provable.frozen copies it
NO_PLAN = "it has no plan for this mode"
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class UnitPaths(NamedTuple):
    """Where a unit's modules are, from the fused module down; ``act`` may also be None or :data:`FUNCTION`."""

    conv: Path | None
    norm: Path
    act: Path | str | None


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
        paths = [path for unit in units for path in unit if isinstance(path, tuple)]
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
        The nn.Identity that were left out of the source.
    source
        Python source of ``forward(self, chains, x)``, written from the trace: the module's own forward, with
        ``chains.run(i, x, shortcut)`` in the place of each chain.
    options
        Engine and memory: a plain tuple of what :class:`fused_resnet.chain_spec.Options` names.
    globals
        What the functions that ran read of their modules: a module's name, and a name in it.
    """

    chains: tuple[ChainPaths, ...]
    containers: tuple[Container, ...]
    identities: tuple[Path, ...]
    source: str
    options: tuple[str, str]
    globals: Reads = ()
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
            self, "functions", tuple((f, *_body(f)) for f in functions if not f.__module__.startswith("torch"))
        )
        forwards = tuple(container.cls.forward for container in self.containers)
        object.__setattr__(self, "forwards", forwards)

    @property
    def modules(self) -> list[Path]:
        """The paths of all modules that the chains run."""
        return [path for chain in self.chains for block in chain for path in block.modules]

    def __reduce__(self) -> Any:
        containers = tuple(c._replace(attributes=_without_references(c.attributes)) for c in self.containers)
        of_modules = _without_references(self.globals)
        return _restore_plan, (self.chains, containers, self.identities, self.source, self.options, of_modules)


REFERENCES = (FunctionType, BuiltinFunctionType, ModuleType, type)
AS_LOADED = "as it is where the plan is loaded"


def _without_references(reads: Reads) -> Reads:
    """Return reads whose functions, classes and modules are looked up again where a pickle is loaded."""
    return tuple((names, AS_LOADED if isinstance(value, REFERENCES) else value) for names, value in reads)


def _with_references(reads: Reads, find: Callable[[tuple[str, ...]], Any]) -> Reads:
    return tuple((names, find(names) if value == AS_LOADED else value) for names, value in reads)


def _restore_plan(
    chains: Any, containers: tuple[Container, ...], identities: Any, source: str, options: Any, of_modules: Reads
) -> Plan:
    def of_class(container: Container) -> Container:
        reads = _with_references(container.attributes, lambda names: getattr(container.cls, names[-1], None))
        return container._replace(attributes=reads)

    of_modules = _with_references(of_modules, lambda names: vars(importlib.import_module(names[0])).get(names[1]))
    return Plan(chains, tuple(map(of_class, containers)), identities, source, options, of_modules)


def _body(function: FunctionType) -> tuple[Any, ...]:
    return function.__code__, function.__defaults__, function.__kwdefaults__ and tuple(function.__kwdefaults__.items())


class PreparedChain(NamedTuple):
    """A chain's geometry, parameters and statistics, read from the modules at the start of a call."""

    signature: Signature
    parameters: list[Tensor]
    running: list[Tensor]
    norms: list[Any]  # of every unit; None where it does not normalise by its batch
    pool: Path | None = None  # that runs behind the chain, where it has become one that the kernels do not know


class PreparedChains:
    """The chains of one call, as the generated forward sees them; in the place of one that cannot serve, why not."""

    def __init__(self, module: nn.Module, plan: Plan, chains: list[PreparedChain | str]):
        self.module = module
        self.plan = plan
        self.chains = chains

    def run(self, index: int, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """Run one chain and update the running statistics of its batch norms."""
        chain = self.chains[index]
        if isinstance(chain, str) or not self.serves(chain, x):
            note_last_call(self.module, chain if isinstance(chain, str) else f"the last call gave a chain {x.dtype}")
            return run_stock(self.module, self.plan.chains[index], x, shortcut)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            if shortcut is not None and is_projection(chain.signature[0][0][1]):  # its convolution reads it
                shortcut = shortcut.to(dtype)
        if shortcut is not None and shortcut.dtype != x.dtype:
            # the sum has another dtype than the chain: the add and its ReLU are stock's
            ((units, kind, pool),), options = chain.signature
            *rest, relu = units[-1]
            without_add = (((*units[:-1], (*rest, False)), None, pool),), options
            z = self._run(chain._replace(signature=without_add), x, None) + _strided(kind, shortcut)
            return torch.relu(z) if relu else z
        z = self._run(chain, x, shortcut)
        return z if chain.pool is None else child(self.module, chain.pool)(z)

    def serves(self, chain: PreparedChain, x: Tensor) -> bool:
        """Whether a chain can run on ``x``."""
        return serves_dtype(chain, x)

    def _run(self, chain: PreparedChain, x: Tensor, shortcut: Tensor | None) -> Tensor:
        z, moments = run_chain(chain.signature, x, shortcut, chain.parameters, chain.running)
        update_running_stats(chain, moments)
        return z


def run_stock(module: nn.Module, paths: ChainPaths, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """Run a chain's own modules, as the forward that was traced does."""
    for block in paths:
        source = x if shortcut is None else shortcut
        shortcut = None
        for unit in block.units:
            last = unit is block.units[-1]
            x = _run_unit(module, unit, x)
            if last and block.shortcut is not None:
                if isinstance(block.shortcut, UnitPaths):
                    added = _run_unit(module, block.shortcut, source)
                else:
                    added = _strided(block.shortcut, source)
                x = x.add_(added) if block.adds_in_place else x + added
            if unit.act is not None:
                x = child(module, unit.act)(x) if isinstance(unit.act, tuple) else torch.relu(x)
        if block.pool is not None:
            x = child(module, block.pool)(x)
    return x


def _run_unit(module: nn.Module, unit: UnitPaths, x: Tensor) -> Tensor:
    y = x if unit.conv is None else child(module, unit.conv)(x)
    z: Tensor = child(module, unit.norm)(y)
    return z


def _strided(kind: Any, shortcut: Tensor) -> Tensor:
    """Return what a shortcut without parameters adds."""
    return Padded(*kind).apply(shortcut) if isinstance(kind, tuple) else shortcut


class Kept(NamedTuple):
    """What a module's chains were read as, and what shows that they would be again."""

    module: nn.Module
    plan: Plan
    snapshot: Snapshot
    chains: list[PreparedChain | str]

    def serve(self, module: nn.Module, plan: Plan) -> bool:
        """Whether this is what :func:`prepare` would return."""
        return (
            self.module is module
            and self.plan is plan
            and self.snapshot.holds()
            and not _why_not_world(plan)
            and not any(_why_not_read(module, container) for container in plan.containers)
        )


class Fusion:
    """What a fused module has besides its own.

    Attributes
    ----------
    plans
        By ``training``.
    last
        Why the last call, or a chain of it, was stock's; empty where all was fused.
    kept
        What the last call has read, for the next; never copied, since it is of one module.
    """

    def __init__(self, plans: dict[bool, Plan]):
        self.plans = plans
        self.last = ""
        self.kept: Kept | None = None

    def __reduce__(self) -> Any:
        return Fusion, (self.plans,)


def fusion_of(module: nn.Module) -> Fusion | None:
    """Return what a module has where it is fused; one that an earlier release has pickled runs stock."""
    fusion = module.__dict__.get("_fused")
    return fusion if isinstance(fusion, Fusion) else None


def plan_of(module: nn.Module) -> Plan | None:
    """Return how a module runs in the mode that it is in, where it is fused."""
    fusion = fusion_of(module)
    return None if fusion is None else fusion.plans.get(module.training)


class FusedModule(nn.Module):
    """The mixin in front of a module's own class; its ``_fused`` is a :class:`Fusion`."""

    def extra_repr(self) -> str:
        """Say so where the model is printed."""
        return ", ".join(filter(None, (super().extra_repr(), "fused")))

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return restore, (stock_class(type(self)),), *reduced[2:]


@functools.cache
def fused_class(cls: Any) -> Any:
    """Return the subclass of ``cls`` that a fused module gets; one for each class."""

    @functools.wraps(cls.forward)  # what asks for a forward's signature gets the stock one
    def forward(self: FusedModule, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self)
        if plan is None:
            reason = NO_PLAN
        elif len(args) != 1 or kwargs:
            reason = "the last call had other arguments than one tensor"
        elif not (reason := why_not_input(args[0], self.training)):
            chains = prepare(self, plan) if torch.compiler.is_compiling() else prepare_again(self, plan)
            if isinstance(chains, str):
                reason = chains
            elif serves_batch(chains, args[0]):
                note_last_call(self, "")
                return plan.forward(self, PreparedChains(self, plan, chains), args[0])
            else:
                reason = "the last call had an empty batch"
        note_last_call(self, reason)
        return super(FusedModule, self).forward(*args, **kwargs)

    # under its own name, by which wrapping policies and checkpoints know a class
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (FusedModule, cls), {"forward": forward, **names})


def stock_class(cls: type) -> type:
    """Return the class that :func:`fused_class` was given."""
    return cls.__mro__[cls.__mro__.index(FusedModule) + 1]


def own_class(module: nn.Module) -> type:
    """Return a module's own class, fused or not."""
    return stock_class(type(module)) if isinstance(module, FusedModule) else type(module)


def restore(cls: type[nn.Module]) -> nn.Module:
    """Make an empty fused module, for pickle and deepcopy to fill."""
    fused = fused_class(cls)  # type: ignore[arg-type]
    module: nn.Module = fused.__new__(fused)
    return module


def note_last_call(module: nn.Module, reason: str) -> None:
    """Keep why the last call of a module, or of a chain in it, was stock's; :func:`fused_resnet.explain` says it."""
    fusion = None if torch.compiler.is_compiling() else fusion_of(module)
    if fusion is not None:
        fusion.last = reason


def why_not_input(x: Any, training: bool) -> str:
    """Return why a call with this argument cannot be fused at all; asked before anything is read from the modules."""
    compiling = torch.compiler.is_compiling()
    if not isinstance(x, Tensor) or not (compiling or type(x) is Tensor):
        return f"the last call had a {type(x).__name__}, not a torch.Tensor"
    if x.dim() != 4:
        return f"the last call had a tensor of {x.dim()} dimensions, not of 4"
    if x.device.type == "meta":
        return "the last call had a tensor without data"
    if not compiling and (_has_any_global_hook() or _has_function_mode()):
        return "a global module hook or a TorchFunctionMode sees every call"
    exporting = compiling and torch.compiler.is_exporting()
    if torch._C._get_tracing_state() or (exporting and (not training or torch.onnx.is_in_onnx_export())):
        return "what is traced, or exported for inference or to ONNX, is plain PyTorch"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "the last call was inside a torch.func transform or forward-mode differentiation"
    return ""


def _has_function_mode() -> bool:
    """Whether a TorchFunctionMode looks at every call of torch; a device given to new tensors is none to us."""
    return bool(torch._C._len_torch_function_stack()) and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


def serves_batch(chains: list[PreparedChain | str], x: Tensor) -> bool:
    """Whether there is a batch, or other processes that wait for this one's part of their statistics."""
    return x.numel() > 0 or any(
        type(norm) is nn.SyncBatchNorm and group_name(norm) is not None
        for chain in chains
        if not isinstance(chain, str)
        for norm in chain.norms
    )


def serves_dtype(chain: PreparedChain, x: Tensor) -> bool:
    """Whether stock convolutions would take ``x``: in the dtype of their weights, or cast by autocast.

    Autocast casts what convolutions read; what a norm or an add reads keeps its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        if x.dtype == torch.get_autocast_dtype(x.device.type):
            return True
        (units, shortcut, _), *_ = chain.signature[0]
        if units[0][0] is None or (shortcut is not None and not is_projection(shortcut)):
            return False
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.is_floating_point() and all(p.dtype == x.dtype for p in chain.parameters if p.dim() == 4)


def prepare(module: nn.Module, plan: Plan) -> list[PreparedChain | str] | str:
    """Read every chain of a plan from the module's children as they are now.

    In the place of a chain that cannot serve is the reason; where none can, or the forward itself is another than the
    one that was traced, the reason is all.
    """
    if reason := _why_not_world(plan):
        return reason
    for container in plan.containers:
        if reason := why_not_as_traced(module, container):
            return reason
    for path in plan.identities:
        identity = child(module, path)
        if reason := _why_not_plain(identity, path) or _why_not_type(identity, nn.Identity, path):
            return reason
    chains = [_prepare_chain(module, paths, plan.options) for paths in plan.chains]
    serving = [chain for chain in chains if not isinstance(chain, str)]
    return chains if serving else str(chains[0])


def prepare_again(module: nn.Module, plan: Plan) -> list[PreparedChain | str] | str:
    """Return what :func:`prepare` does, from the last call where all that it reads is as it was then."""
    fusion: Fusion = module.__dict__["_fused"]
    if fusion.kept is not None and fusion.kept.serve(module, plan):
        return fusion.kept.chains
    chains = prepare(module, plan)
    fusion.kept = None if isinstance(chains, str) else _keep(module, plan, chains)
    return chains


def _keep(module: nn.Module, plan: Plan, chains: list[PreparedChain | str]) -> Kept | None:
    """Keep what was read of a module, unless it may change in place or some of it is in no module."""
    paths = (*plan.modules, *plan.identities)
    layers = [child(module, path) for path in paths]
    if any(type(m) is nn.SyncBatchNorm or (is_frozen_norm(m) and "eps" not in vars(m)) for m in layers):
        return None  # processes, a class
    if any(isinstance(value, (list, Tensor)) for layer in layers for value in vars(layer).values()):
        return None
    inside = {path[:n] for path in (*paths, *(c.path for c in plan.containers)) for n in range(len(path) + 1)}
    return Kept(module, plan, Snapshot.of(child(module, path) for path in inside), chains)


def _why_not_world(plan: Plan) -> str | None:
    """Return what has changed, outside of its modules, of what a plan relies on."""
    # torch.export, which puts functions of its own in their place, sees what it traces
    if not (torch.compiler.is_compiling() and torch.compiler.is_exporting()) and not layers_are_stock():
        return "a forward of torch's own layers, or a function that it calls, has been replaced"
    for container, forward in zip(plan.containers, plan.forwards, strict=True):
        if container.cls.forward is not forward:
            return f"{container.cls.__name__}.forward has changed since it was fused"
    for (of_module, name), value in plan.globals:
        if not same(sys.modules[of_module].__dict__.get(name), value):
            return f"the global {name} of {of_module} has changed since it was fused"
    for function, *body in plan.functions:
        if tuple(body) != _body(function):
            return f"{function.__qualname__} has changed since it was fused"
    return None


def _prepare_chain(module: nn.Module, paths: ChainPaths, options: tuple[str, str]) -> PreparedChain | str:
    prepared = PreparedChain((), [], [], [])
    blocks = []
    for block in paths:
        signature = _read_block(module, block, prepared)
        if isinstance(signature, str):
            return signature
        blocks.append(signature)
    pool = paths[-1].pool if blocks[-1][2] is None else None
    return prepared._replace(signature=(tuple(blocks), options), pool=pool)


def _read_block(module: nn.Module, paths: BlockPaths, prepared: PreparedChain) -> Signature | str:
    """Return a block's signature and add its tensors to a chain's, or say why it cannot serve."""
    units = []
    for unit in paths.units:
        signature = _read_unit(module, unit, prepared)
        if isinstance(signature, str):
            return signature
        units.append(signature)
    shortcut: Any = paths.shortcut
    if isinstance(shortcut, UnitPaths):
        shortcut = _read_unit(module, shortcut, prepared)
        if isinstance(shortcut, str):
            return shortcut
    elif isinstance(shortcut, Padded):
        shortcut = (shortcut.stride, shortcut.before, shortcut.after)
    pool_signature = None
    if paths.pool is not None:
        pool = child(module, paths.pool)
        if not (_why_not_plain(pool, paths.pool) or why_not_pool(pool, paths.pool)):
            pool_signature = (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding))
    return tuple(units), shortcut, pool_signature


def _read_unit(module: nn.Module, unit: UnitPaths, prepared: PreparedChain) -> Signature | str:
    """Return a unit's signature and add its tensors to a chain's, or say why it cannot serve."""
    conv_signature = None
    if unit.conv is not None:
        conv = child(module, unit.conv)
        if reason := _why_not_plain(conv, unit.conv) or _why_not_conv(conv, unit.conv):
            return reason
        geometry = (pair(conv.stride), pair(conv.padding), pair(conv.dilation))
        conv_signature = (*geometry, conv.groups, conv.bias is not None)
        if reason := _read_parameters(conv, unit.conv, prepared):
            return reason
    norm = child(module, unit.norm)
    if reason := _why_not_plain(norm, unit.norm) or _why_not_norm(norm, unit.norm):
        return reason
    if reason := _read_parameters(norm, unit.norm, prepared):
        return reason
    batch_stats = not is_frozen_norm(norm) and (norm.training or norm.running_mean is None)
    prepared.norms.append(norm if batch_stats else None)
    if not batch_stats:
        prepared.running.extend([norm.running_mean, norm.running_var])
    if isinstance(unit.act, tuple):
        act = child(module, unit.act)
        if reason := _why_not_plain(act, unit.act) or _why_not_type(act, nn.ReLU, unit.act):
            return reason
    affine = (norm.weight is not None, norm.bias is not None)
    group = group_name(norm) if type(norm) is nn.SyncBatchNorm else None
    return conv_signature, *affine, batch_stats, group, float(norm.eps).hex(), unit.act is not None


def layers_are_stock() -> bool:
    """Whether the layers that chains stand for compute what torch's do: nobody has replaced their forward."""
    return (
        nn.Conv2d.forward is _CONV2D
        and nn.Conv2d._conv_forward is _CONV_FORWARD
        and nn.BatchNorm2d.forward is _BATCH_NORM
        and nn.ReLU.forward is _RELU
        and nn.MaxPool2d.forward is _MAX_POOL
        and F.conv2d is _F_CONV2D
        and F.batch_norm is _F_BATCH_NORM
        and F.relu is _F_RELU
        and F.max_pool2d is _F_MAX_POOL
        and (torch.compiler.is_compiling() or _is_called_as_stock())
        and nn.Module.__getattr__ is _GETATTR
        and nn.BatchNorm2d._check_input_dim is _CHECK_INPUT_DIM
        and torch.conv2d is _TORCH_CONV2D
        and torch.batch_norm is _TORCH_BATCH_NORM
        and torch.relu is _TORCH_RELU
    )


def _is_called_as_stock() -> bool:
    return nn.Conv2d.__call__ is _CALL and nn.BatchNorm2d.__call__ is _CALL and nn.ReLU.__call__ is _CALL


_CONV2D, _CONV_FORWARD, _BATCH_NORM = nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.BatchNorm2d.forward
_RELU, _MAX_POOL = nn.ReLU.forward, nn.MaxPool2d.forward
_CALL, _GETATTR, _CHECK_INPUT_DIM = nn.Module.__call__, nn.Module.__getattr__, nn.BatchNorm2d._check_input_dim
_TORCH_CONV2D, _TORCH_BATCH_NORM, _TORCH_RELU = torch.conv2d, torch.batch_norm, torch.relu
_F_CONV2D, _F_BATCH_NORM, _F_RELU, _F_MAX_POOL = F.conv2d, F.batch_norm, F.relu, F.max_pool2d


def _read_parameters(layer: Any, path: Path, prepared: PreparedChain) -> str | None:
    """Add a layer's weight and bias to a chain's, or say why they cannot be handed to it."""
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            cls = type(parameter)
            if cls is not nn.Parameter and cls is not Tensor and cls.__torch_function__ is not _NOT_WATCHING:
                return f"{'.'.join(path)} has a parameter of a subclass that sees torch's calls"
            prepared.parameters.append(parameter)
    return None


_NOT_WATCHING = nn.Parameter.__torch_function__


def child(module: nn.Module, path: Path) -> Any:
    """Return the descendant of ``module`` at ``path``."""
    for name in path:
        module = getattr(module, name)
    return module


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Read a geometry as torch's layers do: ``n`` means ``(n, n)``."""
    first, second = (value, value) if isinstance(value, int) else value
    return _static(first), _static(second)


def _static(n: int) -> int:
    """Return ``n``; makes ``torch.compile(dynamic=True)`` take it as the constant that it is, not as a symbol."""
    return len((None,) * n)


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether a module is torchvision's frozen batch norm, recognised without importing torchvision."""
    return type(norm).__name__ == "FrozenBatchNorm2d"


def _why_not_plain(module: Any, path: Path) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{'.'.join(path)} has a hook"
    # what hides a method of the layer's class
    own = module.__dict__
    if "forward" in own or "_conv_forward" in own or "_check_input_dim" in own or "_call_impl" in own:
        return f"{'.'.join(path)} has a forward of its own"
    return None


def _why_not_type(module: nn.Module, cls: type, path: Path) -> str | None:
    return None if type(module) is cls else f"{'.'.join(path)} is a {type(module).__name__}, not a {cls.__name__}"


def _why_not_conv(conv: Any, path: Path) -> str | None:
    if reason := _why_not_type(conv, nn.Conv2d, path):
        return reason
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"{'.'.join(path)} has padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
    return None


def _why_not_norm(norm: Any, path: Path) -> str | None:
    if is_frozen_norm(norm):
        return None if hasattr(norm, "eps") else f"{'.'.join(path)} has no eps"
    return None if type(norm) in BATCH_NORMS else _why_not_type(norm, nn.BatchNorm2d, path)


def why_not_pool(pool: Any, path: Path) -> str | None:
    """Return why the kernels do not know a pool, or None."""
    if reason := _why_not_type(pool, nn.MaxPool2d, path):
        return reason
    if pool.return_indices or pool.ceil_mode or pair(pool.dilation) != (1, 1):
        return f"{'.'.join(path)} has return_indices, ceil_mode or dilation"
    kernel = pair(pool.kernel_size)
    return f"{'.'.join(path)} has a window of more than 255" if kernel[0] * kernel[1] > 255 else None


def why_not_as_traced(module: nn.Module, container: Container) -> str | None:
    """Return in what a module is another than the one that was traced, or None."""
    name = ".".join(container.path) or "the module"
    inner = child(module, container.path)
    if container.path and own_class(inner) is not container.cls:
        return f"{name} is a {own_class(inner).__name__}, was a {container.cls.__name__} when it was fused"
    if container.path and (reason := _why_not_plain(inner, container.path)):
        return reason
    if tuple(inner._modules) != container.children:
        return f"{name} has other children than when it was fused"
    for child_name in container.children:
        if (getattr(inner, child_name) is None) != (child_name in container.missing):
            return f"{name}.{child_name} has changed since it was fused"
    return _why_not_read(module, container)


def _why_not_read(module: nn.Module, container: Container) -> str | None:
    """Return what is no longer what the trace read there, or None."""
    for names, value in container.attributes:
        now: Any = child(module, container.path)
        for attribute in names:
            now = getattr(now, attribute, ABSENT)
        if not same(now, value):
            return f"{'.'.join(container.path) or 'the module'}.{'.'.join(names)} has changed since it was fused"
    return None


def update_running_stats(chain: PreparedChain, moments: Sequence[Tensor]) -> None:
    """Move the running statistics of a chain's batch norms in training, as ``torch.nn.BatchNorm2d`` does.

    What activation checkpointing runs again has moved them in its first forward.
    """
    if not torch.compiler.is_compiling() and is_recomputation():
        return
    by_momentum: dict[float | None, tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = {}
    for norm, new in zip(chain.norms, moments, strict=True):
        if norm is None or not norm.training or not norm.track_running_stats:
            continue
        counter = norm.num_batches_tracked
        if norm.running_mean is None:
            if counter is not None:
                counter.add_(1)
            continue
        momentum = 0.0 if norm.momentum is None and counter is None else norm.momentum
        means, variances, counters, batch = by_momentum.setdefault(momentum, ([], [], [], []))
        means.append(norm.running_mean)
        variances.append(norm.running_var)
        batch.append(new)
        if counter is not None:
            counters.append(counter)
    for momentum, tensors in by_momentum.items():
        engine, _ = chain.signature[-1]
        update_running_stats_(engine, *tensors, momentum)
