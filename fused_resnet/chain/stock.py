"""What a chain computes, in stock differentiable torch: :mod:`fused_resnet.chain.schedule` without its schedule.

For the gradient of a gradient, which autograd makes of this as of any stock network.  It rounds where the kernels
round: a convolution reads and writes the dtype of the activations, and from there to the next activation everything is
in the accumulation dtype.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.chain.spec import Block, Chain, Padded, Parameters, Unit, convolve, split_parameters
from fused_resnet.ops.activation import value
from fused_resnet.ops.library import accumulation_dtype

# the running mean and variance of a unit that does not normalise by its batch; empty for the others
Running = Sequence[Tensor]


def forward(
    chain: Chain, x: Tensor, shortcut: Tensor | None, parameters: Sequence[Tensor], running: Sequence[Tensor]
) -> Tensor:
    """Return the output of a chain without synchronised norms.

    Parameters
    ----------
    x, shortcut, parameters, running
        As in :func:`fused_resnet.chain.schedule.forward`; none of them is written.
    """
    stats = iter(running)
    frozen = [() if unit.batch_stats else (next(stats), next(stats)) for unit in chain.units]
    by_unit = split_parameters(chain, parameters)
    for block, of_block, frozen_stats in zip(
        chain.blocks, chain.by_block(by_unit), chain.by_block(frozen), strict=True
    ):
        x = _block(block, x, x if shortcut is None else shortcut, of_block, frozen_stats)
        shortcut = None
    return x


def _block(
    block: Block, x: Tensor, source: Tensor, parameters: Sequence[Parameters], running: Sequence[Running]
) -> Tensor:
    last = len(block.units) - 1
    z = x
    for i, unit in enumerate(block.units):
        z = _conv_norm(unit, z, parameters[i], running[i])
        if i == last and block.shortcut is not None:
            z = z + _residual(block, source, parameters[-1], running[-1])
        z = value(unit.act, z).to(x.dtype)
    return z if block.pool is None else F.max_pool2d(z, *block.pool)


def _residual(block: Block, source: Tensor, parameters: Parameters, running: Running) -> Tensor:
    """Return what is added at a block's end; ``parameters`` and ``running`` are read for a projection."""
    if isinstance(block.shortcut, Unit):
        return _conv_norm(block.shortcut, source, parameters, running)
    if isinstance(block.shortcut, Padded):
        return block.shortcut.apply(source)
    return source


def _conv_norm(unit: Unit, z: Tensor, p: Parameters, running: Running) -> Tensor:
    """Return ``a·y + b`` in the accumulation dtype."""
    dtype = accumulation_dtype(z.dtype)
    if unit.conv is not None:
        z = convolve(unit.conv, z, p.conv_weight.to(z.dtype), p.conv_bias)
    mean, var = running or (None, None)
    weight, bias = (None if vector is None else vector.to(dtype) for vector in (p.weight, p.bias))
    if weight is None and bias is not None:  # torch 2.11 differentiates β without γ wrongly, the second time
        weight = torch.ones_like(bias)
    return F.batch_norm(z.to(dtype), mean, var, weight, bias, training=unit.batch_stats, eps=unit.eps)
