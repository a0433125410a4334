"""What a fused module is: its own class, with a mixin in front whose forward runs chains where it can.

A module is fused by assigning a subclass of its own class to ``__class__`` and leaving a :class:`Fusion` in its
``__dict__``; parameters, buffers, children, hooks and keys stay what they were.  Every call looks at the children
afresh, and any call that no chain serves is ``super().forward(x)``: stock.

All that a fused forward calls is also traced by ``torch.compile``; it is written in what Dynamo can follow.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: F401 - TorchScript, given a stock forward, looks its names up here
from torch import Tensor, nn

from fused_resnet.blocks.fusion import note_last_call, plan_of, prepare_again
from fused_resnet.blocks.layers import child
from fused_resnet.blocks.mixin import FusedModule, stock_class
from fused_resnet.blocks.plan import TENSORS, ChainPaths, Plan, UnitPaths
from fused_resnet.blocks.prepare import PreparedChain, prepare
from fused_resnet.blocks.refusals import NO_PLAN, why_not_input
from fused_resnet.blocks.running_stats import update_running_stats
from fused_resnet.chain.autograd import run_chain
from fused_resnet.chain.forward import ShortcutError
from fused_resnet.chain.spec import Padded, act_of_signature, act_signature, is_projection
from fused_resnet.chain.synchronized import group_name
from fused_resnet.ops.activation import NONE, Act, value


@functools.cache
def fused_class(cls: Any) -> Any:
    """Return the subclass of ``cls`` that a fused module gets; one for each class."""

    @functools.wraps(cls.forward)  # what asks for a forward's signature gets the stock one
    def forward(self: FusedModule, *args: Any, **kwargs: Any) -> Any:
        plan = plan_of(self)
        given: Sequence[Any] = args
        if plan is not None and (kwargs or plan.others or len(plan.kinds) > 1):
            plan, given = plan.serving(args, kwargs) or (plan, ())
        if plan is None:
            reason = NO_PLAN
        elif len(given) != len(plan.kinds):
            reason = "the last call had other arguments than the forward was traced with"
        elif not (reason := why_not_input(given[0], self.training, plan.kinds[0] == TENSORS)):
            chains = prepare(self, plan) if torch.compiler.is_compiling() else prepare_again(self, plan)
            if isinstance(chains, str):
                reason = chains
            elif serves_batch(chains, given[0]):
                note_last_call(self, "")
                return plan.forward(self, PreparedChains(self, plan, chains), *given)
            else:
                reason = "the last call had an empty batch"
        note_last_call(self, reason)
        return super(FusedModule, self).forward(*args, **kwargs)

    def reduce(self: FusedModule, protocol: Any) -> Any:
        reduced: Any = super(FusedModule, self).__reduce_ex__(protocol)
        return restore, (stock_class(type(self)),), *reduced[2:]

    # under its own name, by which wrapping policies and checkpoints know a class
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (FusedModule, cls), {"forward": forward, "__reduce_ex__": reduce, **names})


def restore(cls: type[nn.Module]) -> nn.Module:
    """Make an empty fused module, for pickle and deepcopy to fill."""
    fused = fused_class(cls)  # type: ignore[arg-type]
    module: nn.Module = fused.__new__(fused)
    return module


class PreparedChains:
    """The chains of one call, as the generated forward sees them; in the place of one that cannot serve, why not."""

    def __init__(self, module: nn.Module, plan: Plan, chains: list[PreparedChain | str]):
        self.module = module
        self.plan = plan
        self.chains = chains

    def run_beside(self, index: int, x: Tensor, shortcut: Any) -> Tensor:
        """Run a chain whose shortcut starts from another value than its own input."""
        if not isinstance(shortcut, Tensor) or shortcut.device != x.device or shortcut.layout != torch.strided:
            note_last_call(self.module, f"the last call added a {type(shortcut).__name__} that no chain takes")
            return run_stock(self.module, self.plan.chains[index], x, shortcut, beside=True)
        return self.run(index, x, shortcut)

    def run(self, index: int, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """Run one chain and update the running statistics of its batch norms; a shortcut of None starts from ``x``."""
        chain = self.chains[index]
        if isinstance(chain, str) or not self.serves(chain, x):
            given = f"the last call gave a chain {x.dtype} of {x.dim()} dimensions"
            note_last_call(self.module, chain if isinstance(chain, str) else given)
            return run_stock(self.module, self.plan.chains[index], x, shortcut)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            if shortcut is not None and is_projection(chain.signature[0][0][1]):  # its convolution reads it
                shortcut = shortcut.to(dtype)
        if shortcut is not None and shortcut.dtype != x.dtype:
            # the sum has another dtype than the chain: the add and its ReLU are stock's
            ((units, kind, pool),), options = chain.signature
            *rest, act = units[-1]
            without_add = (((*units[:-1], (*rest, act_signature(NONE))), None, pool),), options
            z = self._run(chain._replace(signature=without_add), x, None) + _strided(kind, shortcut)
            return value(act_of_signature(act), z)
        try:
            z = self._run(chain, x, shortcut)
        except ShortcutError:  # before anything was written; stock may know what to make of it, or what to raise
            note_last_call(self.module, "the last call added what has another shape")
            return run_stock(self.module, self.plan.chains[index], x, shortcut)
        return z if chain.pool is None else child(self.module, chain.pool)(z)

    def serves(self, chain: PreparedChain, x: Tensor) -> bool:
        """Whether a chain can run on ``x``."""
        if x.dim() != 2 + next(iter(chain.dims), 2):
            return False
        here = [p.device == x.device for p in (*chain.parameters, *chain.running)]
        return all(here) and serves_dtype(chain, x)

    def _run(self, chain: PreparedChain, x: Tensor, shortcut: Tensor | None) -> Tensor:
        z, moments = run_chain(chain.signature, x, shortcut, chain.parameters, chain.running)
        update_running_stats(chain, moments)
        return z


def serves_batch(chains: list[PreparedChain | str], x: Tensor | Sequence[Tensor]) -> bool:
    """Whether there is a batch, or other processes that wait for this one's part of their statistics."""
    x = x if isinstance(x, Tensor) else x[0]
    return x.numel() > 0 or any(
        isinstance(norm, nn.SyncBatchNorm) and group_name(norm) is not None
        for chain in chains
        if not isinstance(chain, str)
        for norm in chain.norms
    )


def serves_dtype(chain: PreparedChain, x: Tensor) -> bool:
    """Whether stock convolutions would take ``x``: in the dtype of their weights, or cast by autocast.

    Autocast casts what convolutions read; what a norm or an add reads keeps its dtype.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    for of_norm, is_frozen in chain.norm_dtypes:
        if of_norm != dtype and (is_frozen or of_norm != torch.float32 or dtype == torch.float64):
            return False  # stock raises, or gives what it promotes to
    if autocast:
        if x.dtype == torch.get_autocast_dtype(x.device.type):
            return True
        (units, shortcut, _), *_ = chain.signature[0]
        if units[0][0] is None or (shortcut is not None and not is_projection(shortcut)):
            return False
        return x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return x.is_floating_point() and all(p.dtype == x.dtype for p in chain.parameters if p.dim() > 1)


def run_stock(module: nn.Module, paths: ChainPaths, x: Tensor, shortcut: Any, beside: bool = False) -> Tensor:
    """Run a chain's own modules, as the forward that was traced does; ``beside`` where None is a shortcut, too."""
    for block in paths:
        source = shortcut if beside or shortcut is not None else x
        shortcut, beside = None, False
        for unit in block.units:
            last = unit is block.units[-1]
            x = _run_unit(module, unit, x)
            if last and block.shortcut is not None:
                if isinstance(block.shortcut, UnitPaths):
                    added = _run_unit(module, block.shortcut, source)
                else:
                    added = _strided(block.shortcut, source)
                x = x.add_(added) if block.adds_in_place else x + added
            if isinstance(unit.act, Act):
                x = value(unit.act, x)
            elif unit.act is not None and not unit.is_norm_act:
                x = child(module, unit.act)(x)
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
