"""Swap fused chains into a model, and out of it."""

import warnings
from typing import Any

import torch
from torch import nn

from fused_resnet import engines
from fused_resnet.blocks.fusion import Fusion
from fused_resnet.blocks.mixin import FusedModule, stock_class
from fused_resnet.blocks.module import fused_class
from fused_resnet.ops.self_check import self_check
from fused_resnet.surgery.finder import Finder, places, spans_blocks
from fused_resnet.surgery.report import report_on
from fused_resnet.system.host_memory import keep_freed_memory

WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule")


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
    own class.  Fuse before wrapping: ``fuse`` → DDP or FSDP → ``torch.compile``; ``convert_sync_batchnorm`` may come
    before ``fuse`` or after it.

    For a model on the CPU, glibc is asked to keep freed memory: :mod:`fused_resnet.system.host_memory`.

    Parameters
    ----------
    model
        Any module: torchvision's, timm's, Hugging Face's or hand-written networks.
    strict
        Raise where nothing can be fused; the default warns.
    chain
        What one autograd node spans: ``"block"``, or ``"stage"`` for all blocks in a row that nothing else looks into,
        such as torchvision's ``layer1``: then a block's backward ends in what the block in front begins with, which
        saves passes over the widest tensors; gradients are ready stage by stage.  ``"auto"`` is the block.
    memory
        ``"fast"``, or ``"lean"`` to keep less for backward where that costs time: the raw outputs of the 1×1
        convolutions at a block's end, wherever their gradients can be had without.
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
    if chain not in ("auto", "block", "stage"):
        raise ValueError(f"chain must be 'auto', 'block' or 'stage' (what one autograd node spans), got {chain!r}")
    if memory not in ("fast", "lean"):
        raise ValueError(f"memory must be 'fast' or 'lean' (keeps less for backward), got {memory!r}")
    engines.check_name(engine)
    for device, dtype in {(p.device.type, p.dtype) for p in model.parameters() if p.is_floating_point()}:
        self_check(device)
        engines.choose(engine, device, dtype)
        if device == "cpu":
            keep_freed_memory()
    unfuse(model)
    fused = False
    found = list(places(model, Finder((engine, memory))))
    if chain == "stage":  # whose blocks stay fused by themselves, for where the stage cannot serve
        finder = Finder((engine, memory), stages=True)
        found += [place for place in places(model, finder) if spans_blocks(place[2])]
    for _, module, plans in found:
        if not isinstance(plans, str):
            module.__class__ = fused_class(type(module))  # type: ignore[arg-type]
            vars(module)["_fused"] = Fusion(plans)
            fused = fused or module.training in plans
    if not fused:
        message = f"fused_resnet: nothing to fuse in {type(model).__name__}.\n{report_on(model, found)}"
        if strict:
            raise ValueError(message)
        warnings.warn(message, NothingToFuse, stacklevel=2)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused module its own class back, in place; parameters and buffers are not touched."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.__class__ = stock_class(type(module))
            vars(module).pop("_fused", None)
    return model


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
