"""What a fused module is: its own class, with a mixin in front whose forward runs chains where it can.

A module is fused by assigning a subclass of its own class to ``__class__`` and leaving a :class:`Plan` in its
``__dict__``; parameters, buffers, children, hooks and keys stay what they were.  Every call looks at the children
afresh, and any call that a chain does not serve is ``super().forward(x)``: stock.

Everything in :meth:`FusedModule.forward` is also traced by ``torch.compile``; it is written in what Dynamo can follow.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fused_resnet.chain_ops import run_chain, update_running_stats_
from fused_resnet.chain_spec import Padded, is_projection
from fused_resnet.checkpointing import is_recomputation
from fused_resnet.synchronized import group_name

Path = tuple[str, ...]
Signature = tuple[Any, ...]

FUNCTION = "function"
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

    @property
    def modules(self) -> tuple[Path, ...]:
        """The paths of all modules that the block runs."""
        units = [unit for unit in (*self.units, self.shortcut) if isinstance(unit, UnitPaths)]
        paths = [path for unit in units for path in unit if isinstance(path, tuple)]
        return (*paths, *([] if self.pool is None else [self.pool]))


ChainPaths = tuple[BlockPaths, ...]


class Container(NamedTuple):
    """What the trace of a forward took for granted in a module that it went through."""

    path: Path
    cls: type
    children: tuple[str, ...]
    missing: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]


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
    """

    chains: tuple[ChainPaths, ...]
    containers: tuple[Container, ...]
    identities: tuple[Path, ...]
    source: str
    options: tuple[str, str]
    forward: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        namespace: dict[str, Any] = {}
        exec(compile(self.source, "<fused_resnet forward>", "exec"), namespace)
        object.__setattr__(self, "forward", namespace["forward"])

    @property
    def modules(self) -> list[Path]:
        """The paths of all modules that the chains run."""
        return [path for chain in self.chains for block in chain for path in block.modules]

    def __reduce__(self) -> Any:
        return Plan, (self.chains, self.containers, self.identities, self.source, self.options)


class PreparedChain(NamedTuple):
    """A chain's geometry, parameters and statistics, read from the modules at the start of a call."""

    signature: Signature
    parameters: list[Tensor]
    running: list[Tensor]
    norms: list[Any]  # of every unit; None where it does not normalise by its batch


class PreparedChains:
    """The chains of one call, as the generated forward sees them."""

    def __init__(self, chains: list[PreparedChain]):
        self.chains = chains

    def run(self, index: int, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """Run one chain and update the running statistics of its batch norms."""
        chain = self.chains[index]
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
            if isinstance(kind, tuple):
                (rows, columns), before, after = kind
                shortcut = F.pad(shortcut[:, :, ::rows, ::columns], (0, 0, 0, 0, before, after))
            z = self._run(chain._replace(signature=without_add), x, None) + shortcut
            return torch.relu(z) if relu else z
        return self._run(chain, x, shortcut)

    def _run(self, chain: PreparedChain, x: Tensor, shortcut: Tensor | None) -> Tensor:
        z, moments = run_chain(chain.signature, x, shortcut, chain.parameters, chain.running)
        update_running_stats(chain, moments)
        return z


class FusedModule(nn.Module):
    """The mixin in front of a module's own class; ``_fused`` maps ``training`` to a :class:`Plan`."""

    _fused: dict[bool, Plan]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return restore, (stock_class(type(self)),), *reduced[2:]


@functools.cache
def fused_class(cls: Any) -> Any:
    """Return the subclass of ``cls`` that a fused module gets; one for each class."""

    @functools.wraps(cls.forward)  # what asks for a forward's signature gets the stock one
    def forward(self: FusedModule, *args: Any, **kwargs: Any) -> Any:
        plan = self._fused.get(self.training) if "_fused" in self.__dict__ else None
        if plan is not None and len(args) == 1 and not kwargs and serves_input(args[0], self.training):
            chains = prepare(self, plan)
            if not isinstance(chains, str) and serves_batch(chains, args[0]) and serves_dtype(chains, args[0]):
                return plan.forward(self, PreparedChains(chains), args[0])
        return super(FusedModule, self).forward(*args, **kwargs)

    namespace = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"Fused{cls.__name__}", (FusedModule, cls), namespace)


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


def serves_input(x: Any, training: bool) -> bool:
    """Whether a call with this argument can be fused at all; asked before anything is read from the modules."""
    compiling = torch.compiler.is_compiling()
    return (
        isinstance(x, Tensor)
        and (compiling or (type(x) is Tensor and not _has_any_global_hook()))
        and not torch._C._get_tracing_state()
        and x.dim() == 4
        and x.device.type != "meta"
        # an exported model for inference is plain aten, which never needs this package
        and (training or not (compiling and torch.compiler.is_exporting()))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def serves_batch(chains: list[PreparedChain], x: Tensor) -> bool:
    """Whether there is a batch, or other processes that wait for this one's part of their statistics."""
    return x.numel() > 0 or any(
        type(norm) is nn.SyncBatchNorm and group_name(norm) is not None for chain in chains for norm in chain.norms
    )


def serves_dtype(chains: list[PreparedChain], x: Tensor) -> bool:
    """Whether stock convolutions would take ``x``: in the dtype of their weights, or cast by autocast.

    Autocast casts what convolutions read; what a norm or an add reads keeps its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        if x.dtype == torch.get_autocast_dtype(x.device.type):
            return True
        for chain in chains:
            (units, shortcut, _), *_ = chain.signature[0]
            if units[0][0] is None or (shortcut is not None and not is_projection(shortcut)):
                return False
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.is_floating_point() and all(
        p.dtype == x.dtype for chain in chains for p in chain.parameters if p.dim() == 4
    )


def prepare(module: nn.Module, plan: Plan) -> list[PreparedChain] | str:
    """Read every chain of a plan from the module's children as they are now, or say why one cannot serve."""
    for container in plan.containers:
        if reason := _why_not_as_traced(module, container):
            return reason
    for path in plan.identities:
        identity = child(module, path)
        if reason := _why_not_plain(identity, path) or _why_not_type(identity, nn.Identity, path):
            return reason
    chains = []
    for paths in plan.chains:
        chain = _prepare_chain(module, paths, plan.options)
        if isinstance(chain, str):
            return chain
        chains.append(chain)
    return chains


def _prepare_chain(module: nn.Module, paths: ChainPaths, options: tuple[str, str]) -> PreparedChain | str:
    prepared = PreparedChain((), [], [], [])
    blocks = []
    for block in paths:
        signature = _read_block(module, block, prepared)
        if isinstance(signature, str):
            return signature
        blocks.append(signature)
    return prepared._replace(signature=(tuple(blocks), options))


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
        if reason := _why_not_plain(pool, paths.pool) or _why_not_pool(pool, paths.pool):
            return reason
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
        prepared.parameters.append(conv.weight)
        if conv.bias is not None:
            prepared.parameters.append(conv.bias)
    norm = child(module, unit.norm)
    if reason := _why_not_plain(norm, unit.norm) or _why_not_norm(norm, unit.norm):
        return reason
    prepared.parameters.extend([p for p in (norm.weight, norm.bias) if p is not None])
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
    if "forward" in module.__dict__:
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


def _why_not_pool(pool: Any, path: Path) -> str | None:
    if reason := _why_not_type(pool, nn.MaxPool2d, path):
        return reason
    if pool.return_indices or pool.ceil_mode or pair(pool.dilation) != (1, 1):
        return f"{'.'.join(path)} has return_indices, ceil_mode or dilation"
    kernel = pair(pool.kernel_size)
    return f"{'.'.join(path)} has a window of more than 255" if kernel[0] * kernel[1] > 255 else None


def _why_not_as_traced(module: nn.Module, container: Container) -> str | None:
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
    for attribute, value in container.attributes:
        now = getattr(inner, attribute, None)
        if (tuple(now) if isinstance(now, list) else now) != value:
            return f"{name}.{attribute} has changed since it was fused"
    return None


def update_running_stats(chain: PreparedChain, moments: Sequence[Tensor]) -> None:
    """Move the running statistics of a chain's batch norms in training, as ``torch.nn.BatchNorm2d`` does.

    What activation checkpointing runs again has moved them in its first forward.
    """
    if not torch.compiler.is_compiling() and is_recomputation():
        return
    by_momentum: dict[float | None, tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = {}
    for norm, new in zip(chain.norms, moments, strict=True):
        if norm is None or not norm.training or not norm.track_running_stats or norm.running_mean is None:
            continue
        counter = norm.num_batches_tracked
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
