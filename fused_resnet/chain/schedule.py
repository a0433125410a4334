"""The schedule of a chain of units: ``conv → batch norm → ReLU``, again and again, and shortcuts' adds in between.

A chain is one autograd node: one block of a network, or a whole stage.  Between its units only the raw convolution
outputs ``y`` and per-channel vectors are kept for backward; the normalised activations ``z`` in between are temporary
and rebuilt when a weight gradient needs them.  :mod:`fused_resnet.chain.forward` and :mod:`fused_resnet.chain.backward`
are written as mirror images.  All are plain functions of tensors, made an autograd node for eager mode and for the
dispatcher in :mod:`fused_resnet.chain.autograd`.

====================  =======================================================================
forward               backward
====================  =======================================================================
``y = conv(z, w)``    ``dz = dgrad(dy, w)``, ``dw = wgrad(dy, z)``, ``z`` rebuilt from ``y``
``mean, var of y``    ``dy = a·((G − g0) − k·(y − mean))`` from ``ΣG`` and ``ΣG·(y − mean)``
``z = act(a·y + b)``  ``G = dz`` where not ``z <= 0``, else 0
====================  =======================================================================

Behind an expanding 1×1 convolution at a block's end, ``y`` becomes ``z`` in place and backward does without it: see
:mod:`fused_resnet.ops.pointwise_conv_norm.reference`.
"""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.chain.backward import BlockBackward, Gradient
from fused_resnet.chain.forward import BlockForward
from fused_resnet.chain.spec import Chain, Parameters, split_kept, split_parameters, wants_input


def forward(
    chain: Chain,
    x: Tensor,
    shortcut: Tensor | None,
    parameters: Sequence[Tensor],
    running: Sequence[Tensor],
    k: SimpleNamespace,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a chain.

    Parameters
    ----------
    x
        Input [N, C, H, W]; its dtype is the dtype of every activation, convolution weights are cast to it.
    shortcut
        What the first block's shortcut starts from where that is not ``x``.
    parameters
        Unit by unit, a block's projection at its end: conv weight, conv bias, γ, β, those that exist.
    running
        Running mean and variance of every unit that does not normalise by its batch.
    k
        The kernels, see :func:`fused_resnet.ops.kernels`.

    Returns
    -------
    output
        [N, C', H', W'].
    moments
        Every unit's mean, variance and unbiased variance [3, C].
    kept
        What else backward needs, see :class:`fused_resnet.chain.spec.Kept`.
    """
    by_unit = split_parameters(chain, parameters)
    stats = iter(running)
    frozen = [() if unit.batch_stats else (next(stats), next(stats)) for unit in chain.units]
    of_units: tuple[Sequence[Any], ...] = (by_unit, _cast_weights(by_unit, x.dtype), frozen)
    by_block = zip(chain.blocks, *map(chain.by_block, of_units), strict=True)
    moments: list[Tensor] = []
    kept: list[Tensor] = []
    indices: list[Tensor] = []
    activations = [x]
    for block, block_parameters, weights, frozen_stats in by_block:
        schedule = BlockForward(block, block_parameters, weights, frozen_stats, chain.options.memory, k)
        activations.append(schedule.run(activations[-1], shortcut))
        moments += schedule.moments
        kept += itertools.chain.from_iterable(schedule.kept)
        indices += [] if schedule.index is None else [schedule.index]
        shortcut = None
    _, *outputs, output = activations
    return output, moments, [*kept, *indices, *outputs]


def backward(
    chain: Chain,
    grad: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    output: Tensor | None,
    parameters: Sequence[Tensor],
    moments: Sequence[Tensor],
    kept: Sequence[Tensor],
    needs_grad: Sequence[bool],
    k: SimpleNamespace,
) -> list[Tensor | None]:
    """Return the gradients of ``x``, ``shortcut`` and ``parameters``, None where ``needs_grad`` is false.

    ``output`` is the chain's output where :attr:`Chain.masks_by_output`; the rest is as in :func:`forward`.
    """
    by_unit = split_parameters(chain, parameters)
    units, indices, outputs = split_kept(chain, x, by_unit, kept)
    _, wants_shortcut, *wants = needs_grad
    of_units = (by_unit, moments, units, split_parameters(chain, wants), wants_input(chain, needs_grad, shortcut))
    by_block = zip(*map(chain.by_block, of_units), strict=True)
    pooled = iter(indices)
    schedules = [
        BlockBackward(
            block,
            activation,
            shortcut if n == 0 else None,
            *of_block,
            index=next(pooled) if block.pool else None,
            wants_shortcut=wants_shortcut,
            masks_x=n > 0 and chain.blocks[n - 1].masks_by_output,
            memory=chain.options.memory,
            k=k,
        )
        for n, (block, activation, of_block) in enumerate(zip(chain.blocks, [x, *outputs], by_block, strict=True))
    ]
    gradient: Gradient | None = Gradient(grad, None, owned=False)
    d_shortcut: Tensor | None = None
    for schedule, end in zip(reversed(schedules), reversed([*outputs, output]), strict=True):
        if gradient is not None:
            gradient, d_shortcut = schedule.run(gradient, end if schedule.block.masks_by_output else None)
    gradients = itertools.chain.from_iterable(schedule.gradients for schedule in schedules)
    flat = [
        d_parameter
        for unit, d_unit in zip(by_unit, gradients, strict=True)
        for parameter, d_parameter in zip(unit, d_unit, strict=True)
        if parameter is not None
    ]
    return [None if gradient is None else gradient.grad, d_shortcut, *flat]


def _cast_weights(by_unit: list[Parameters], dtype: torch.dtype) -> list[Tensor | None]:
    """Return every unit's convolution weight in ``dtype``: the parameter itself, or a cast, in one call for all."""
    stale = {
        i: p.conv_weight for i, p in enumerate(by_unit) if p.conv_weight is not None and p.conv_weight.dtype != dtype
    }
    cast = {i: torch.empty_like(weight, dtype=dtype) for i, weight in stale.items()}
    if cast:
        torch._foreach_copy_(list(cast.values()), list(stale.values()))
    return [cast.get(i, p.conv_weight) for i, p in enumerate(by_unit)]
