"""What a fused module has besides its own: its plans, and what its last call read and said."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.blocks.frozen import is_frozen_norm
from fused_resnet.blocks.guards import why_not_read, why_not_world
from fused_resnet.blocks.layers import child
from fused_resnet.blocks.plan import Plan
from fused_resnet.blocks.prepare import PreparedChain, prepare
from fused_resnet.blocks.snapshot import Snapshot
from fused_resnet.blocks.subclasses import layer_class


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


def note_last_call(module: nn.Module, reason: str) -> None:
    """Keep why the last call of a module, or of a chain in it, was stock's; :func:`fused_resnet.explain` says it."""
    fusion = None if torch.compiler.is_compiling() else fusion_of(module)
    if fusion is not None:
        fusion.last = reason


class Kept(NamedTuple):
    """What a module's chains were read as, and what shows that they would be again."""

    module: nn.Module
    plan: Plan
    snapshot: Snapshot
    forwards: dict[Any, Any]  # of the layers' classes that are not torch's own
    chains: list[PreparedChain | str]

    def serve(self, module: nn.Module, plan: Plan) -> bool:
        """Whether this is what :func:`prepare` would return."""
        return (
            self.module is module
            and self.plan is plan
            and self.snapshot.holds()
            and not why_not_world(plan)
            and all([of.forward is forward for of, forward in self.forwards.items()])  # noqa: C419 (half the time)
            and not any(why_not_read(module, container) for container in plan.containers)
        )


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
    if any(isinstance(m, nn.SyncBatchNorm) or (is_frozen_norm(m) and "eps" not in vars(m)) for m in layers):
        return None  # processes, a class
    if any(layer_class(m) is not type(m) for m in layers):
        return None  # a class that may change
    if any(isinstance(value, (list, Tensor)) for layer in layers for value in vars(layer).values()):
        return None
    inside = {path[:n] for path in (*paths, *(c.path for c in plan.containers)) for n in range(len(path) + 1)}
    forwards: dict[Any, Any] = {type(m): type(m).forward for m in layers if not type(m).__module__.startswith("torch.")}
    return Kept(module, plan, Snapshot.of(child(module, path) for path in inside), forwards, chains)
