"""Read the chains of a fused module from its layers, as they are when it is called."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.blocks.activations import act_of_module
from fused_resnet.blocks.frozen import frozen_eps, is_frozen_norm
from fused_resnet.blocks.guards import why_not_as_traced, why_not_world
from fused_resnet.blocks.layers import (
    CONVOLUTIONS,
    child,
    is_norm_act,
    norm_dims,
    padding_of,
    pair,
    sizes,
)
from fused_resnet.blocks.plan import BlockPaths, ChainPaths, Path, Plan, UnitPaths
from fused_resnet.blocks.refusals import (
    why_not_act,
    why_not_conv,
    why_not_inert,
    why_not_norm,
    why_not_parameter,
    why_not_plain,
    why_not_pool,
)
from fused_resnet.blocks.subclasses import layer_class
from fused_resnet.chain.spec import Padded, act_signature
from fused_resnet.chain.synchronized import group_name
from fused_resnet.ops.activation import NONE, Act

Signature = tuple[Any, ...]


class PreparedChain(NamedTuple):
    """A chain's geometry, parameters and statistics, read from the modules at the start of a call."""

    signature: Signature
    parameters: list[Tensor]
    running: list[Tensor]
    norms: list[Any]  # of every unit; None where it does not normalise by its batch
    norm_dtypes: list[tuple[torch.dtype, bool]]  # of every norm's tensors, and whether it is frozen
    dims: list[int]  # the spatial dimensions that its convolutions and norms ask for, all the same
    pool: Path | None = None  # that runs behind the chain, where it has become one that the kernels do not know


def prepare(module: nn.Module, plan: Plan) -> list[PreparedChain | str] | str:
    """Read every chain of a plan from the module's children as they are now.

    In the place of a chain that cannot serve is the reason; where none can, or the forward itself is another than the
    one that was traced, the reason is all.
    """
    if reason := why_not_world(plan):
        return reason
    for container in plan.containers:
        if reason := why_not_as_traced(module, container):
            return reason
    for path in plan.identities:
        if reason := why_not_inert(module, path):
            return reason
    chains = [_prepare_chain(module, paths, plan.options) for paths in plan.chains]
    serving = [chain for chain in chains if not isinstance(chain, str)]
    return chains if serving else str(chains[0])


def _prepare_chain(module: nn.Module, paths: ChainPaths, options: tuple[str, str]) -> PreparedChain | str:
    prepared = PreparedChain((), [], [], [], [], [])
    blocks = []
    for block in paths:
        signature = _read_block(module, block, prepared)
        if isinstance(signature, str):
            return signature
        blocks.append(signature)
    if len(set(prepared.dims)) > 1:
        return f"its layers are over {' and '.join(map(str, sorted(set(prepared.dims))))} dimensions"
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
        if not (why_not_plain(pool, paths.pool) or why_not_pool(pool, paths.pool)):
            pool_signature = (pair(pool.kernel_size), pair(pool.stride), pair(pool.padding))
    return tuple(units), shortcut, pool_signature


def _read_unit(module: nn.Module, unit: UnitPaths, prepared: PreparedChain) -> Signature | str:
    """Return a unit's signature and add its tensors to a chain's, or say why it cannot serve."""
    conv_signature = None
    if unit.conv is not None:
        conv = child(module, unit.conv)
        if reason := why_not_plain(conv, unit.conv) or why_not_conv(conv, unit.conv):
            return reason
        dims = CONVOLUTIONS[layer_class(conv)]
        prepared.dims.append(dims)
        geometry = (sizes(conv.stride, dims), padding_of(conv, dims), sizes(conv.dilation, dims))
        conv_signature = (*geometry, conv.groups, conv.bias is not None)
        if reason := _read_parameters(conv, unit.conv, prepared):
            return reason
    norm = child(module, unit.norm)
    if reason := why_not_plain(norm, unit.norm) or why_not_norm(norm, unit.norm):
        return reason
    if reason := _read_parameters(norm, unit.norm, prepared):
        return reason
    prepared.dims.extend(norm_dims(norm))
    frozen = is_frozen_norm(norm)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if tensor is not None and (tensor.dtype, frozen) not in prepared.norm_dtypes:
            prepared.norm_dtypes.append((tensor.dtype, frozen))
    eps = frozen_eps(norm) if frozen else float(norm.eps)
    batch_stats = not frozen and (norm.training or norm.running_mean is None)
    prepared.norms.append(norm if batch_stats else None)
    if not batch_stats:
        prepared.running.extend([norm.running_mean, norm.running_var])
    act = _read_act(module, unit)
    if isinstance(act, str):
        return act
    affine = (norm.weight is not None, norm.bias is not None)
    group = group_name(norm) if isinstance(norm, nn.SyncBatchNorm) else None
    return conv_signature, *affine, batch_stats, group, eps.hex(), act_signature(act)


def _read_act(module: nn.Module, unit: UnitPaths) -> Act | str:
    """Return a unit's activation, or say why the kernels do not know it."""
    if unit.act is None or isinstance(unit.act, Act):
        return unit.act or NONE
    norm = child(module, unit.norm)
    if unit.is_norm_act and not is_norm_act(norm):
        return f"{'.'.join(unit.norm)} is a {type(norm).__name__}, without an activation"
    act = child(module, unit.act)
    return why_not_plain(act, unit.act) or why_not_act(act, unit.act) or act_of_module(act) or NONE


def _read_parameters(layer: Any, path: Path, prepared: PreparedChain) -> str | None:
    """Add a layer's weight and bias to a chain's, or say why they cannot be handed to it."""
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            if reason := why_not_parameter(parameter, path):
                return reason
            prepared.parameters.append(parameter)
    return None
