"""One block of a chain, forward; its mirror image is :mod:`fused_resnet.chain.backward`."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.chain import synchronized
from fused_resnet.chain.spec import Block, Padded, Parameters, Unit, convolve
from fused_resnet.ops.activation import NONE, RELU, Act
from fused_resnet.ops.library import accumulation_dtype, dense, dense_like
from fused_resnet.ops.pointwise_conv import config
from fused_resnet.ops.pointwise_conv_norm.config import pays

# an activation, or the y, affine and Act that it is made of
Raw = tuple[Tensor, Tensor | None, Act]


def keeps_y(block: Block, i: int, weight: Tensor | None, engine: str, memory: str) -> bool:
    """Whether backward needs the ``y`` of a unit: it can do without at the end, behind an expanding 1×1 convolution."""
    unit = block.all_units[i]
    at_end = i >= len(block.units) - 1 and block.masks_by_output
    if weight is None or not (at_end and unit.batch_stats) or isinstance(block.shortcut, Padded) or block.synchronized:
        return True
    if unit.conv is None or unit.conv.bias or not is_pointwise(unit, weight):
        return True
    if i < len(block.units) and (unit.conv.stride != (1, 1) or (i > 0 and block.units[i - 1].act not in (NONE, RELU))):
        return True
    outputs, inputs = weight.shape[:2]
    return not pays(engine, memory, inputs, outputs, weight.itemsize)


def makes_sums(unit: Unit, weight: Tensor | None, engine: str, memory: str) -> bool:
    """Whether an engine's own product makes a unit's ``y``, or its input gradient, and a batch norm's sums with it."""
    if weight is None or unit.conv is None or unit.conv.bias or unit.conv.stride != (1, 1):
        return False
    outputs, inputs = weight.shape[:2]
    return is_pointwise(unit, weight) and config.makes_sums(engine, memory, inputs, outputs, weight.itemsize)


def is_pointwise(unit: Unit, weight: Tensor | None) -> bool:
    """Whether a unit's convolution is a product of matrices: every pixel's channels by the weight."""
    if unit.conv is None or weight is None:
        return False
    return weight.shape[2:] == (1, 1) and unit.conv.padding == (0, 0) and unit.conv.groups == 1


class ShortcutError(ValueError):
    """A shortcut has not the dtype or the shape of what it is added to."""


class BlockForward:
    """One forward pass.

    Parameters
    ----------
    block
        What is computed.
    parameters, weights
        Of every unit, and its convolution's weight in the dtype of the activations.
    running
        Running mean and variance of every unit that does not normalise by its batch; empty for the others.
    memory
        See :class:`fused_resnet.chain.spec.Options`.
    k
        The kernels, see :func:`fused_resnet.ops.kernels`.

    Attributes
    ----------
    moments
        Every unit's mean, variance and unbiased variance [3, C].
    kept
        The tensors that :class:`fused_resnet.chain.spec.Saved` names, unit by unit.
    index
        What the pool keeps, if there is one.
    """

    def __init__(
        self,
        block: Block,
        parameters: Sequence[Parameters],
        weights: Sequence[Tensor | None],
        running: Sequence[Sequence[Tensor]],
        memory: str,
        k: SimpleNamespace,
    ):
        self.block, self.parameters, self.weights, self.running = block, parameters, weights, running
        self.memory, self.k = memory, k
        self.moments: list[Any] = [None] * len(block.all_units)
        self.kept: list[list[Tensor]] = [[] for _ in block.all_units]
        self.index: Tensor | None = None

    def run(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """Return the block's output; the shortcut starts from ``x`` where it is None."""
        last = len(self.block.units) - 1
        raw: Raw = (dense(x, True) if self.k.channels_last else x, None, NONE)
        for i in range(last):
            raw = (*self.conv_norm(i, self.activation(*raw)), self.block.units[i].act)
        if self.block.shortcut is not None:
            return self.end(raw, x if shortcut is None else shortcut)
        y, affine = self.conv_norm(last, self.activation(*raw))
        act = self.block.units[last].act
        output: Tensor
        if self.block.pool is None:
            output = self.k.batch_norm_act(y, affine, None, None, *act)
        else:
            output, self.index = self.k.batch_norm_act_pool(y, affine, *act, *map(list, self.block.pool))
        return output

    def end(self, raw: Raw, residual: Tensor) -> Tensor:
        """Run the last unit and add the shortcut, which starts from ``residual``."""
        last = len(self.block.units) - 1
        unit, p, weight, residual_affine = self.block.units[last], self.parameters[last], self.weights[last], None
        if isinstance(self.block.shortcut, Unit):
            residual, residual_affine = self.conv_norm(last + 1, residual, self.keeps_y(last + 1))
        elif isinstance(self.block.shortcut, Padded):
            residual = self.block.pixels(residual)
        _, before, after = self.block.padded
        output: Tensor
        if weight is None or self.keeps_y(last):
            y, affine = self.conv_norm(last, self.activation(*raw))
            residual = residual_like(residual, y, before + after)
            output = self.k.batch_norm_act(y, affine, residual, residual_affine, *unit.act, before)
            return output
        x = raw[0]
        _check_batch(x)
        shape = torch.Size((x.shape[0], weight.shape[0], *x.shape[2:]))
        residual = dense(_residual(residual, shape, x.dtype), self.k.channels_last)
        output, moments, affine, gram = self.k.pointwise_conv_norm_act(
            *raw, weight, p.weight, p.bias, unit.eps, residual, residual_affine, unit.act
        )
        self.keep(last, gram, moments, affine)
        return output

    def keeps_y(self, i: int) -> bool:
        """Whether backward needs a unit's ``y``."""
        return keeps_y(self.block, i, self.weights[i], self.k.engine, self.memory)

    def activation(self, y: Tensor, affine: Tensor | None, act: Act) -> Tensor:
        """Return ``act(a·y + b)``, or ``y`` where that is an activation already."""
        z: Tensor = y if affine is None else self.k.batch_norm_act(y, affine, None, None, *act)
        return z

    def conv_norm(self, i: int, z: Tensor, keeps_y: bool = True) -> tuple[Tensor, Tensor]:
        """Return a unit's ``y`` and affine, and keep what backward needs of it."""
        unit, p, weight, k = self.block.all_units[i], self.parameters[i], self.weights[i], self.k
        own_batch = unit.batch_stats and unit.group is None
        if own_batch and makes_sums(unit, weight, k.engine, self.memory):
            _check_batch(z)
            z = dense(z, k.channels_last)
            y, moments, affine = k.pointwise_conv_stats(z, weight, p.weight, p.bias, unit.eps)
        else:
            y = dense(z if unit.conv is None else convolve(unit.conv, z, weight, p.conv_bias), k.channels_last)
            moments, affine = self.statistics(i, y)
        self.keep(i, y if keeps_y else y.new_empty(0), moments, affine)
        return y, affine

    def statistics(self, i: int, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moments that a unit normalises its ``y`` by, and the affine that does it."""
        unit, p, k = self.block.all_units[i], self.parameters[i], self.k
        moments: Tensor
        affine: Tensor
        if unit.group is not None:
            moments, affine = synchronized.batch_norm_stats(y, p.weight, p.bias, unit.eps, unit.group, k)
        elif unit.batch_stats:
            _check_batch(y)
            moments, affine = k.batch_norm_stats(y, p.weight, p.bias, unit.eps)
        else:
            mean, var = (stat.to(accumulation_dtype(y.dtype)) for stat in self.running[i])
            moments = torch.stack((mean, var, var))
            affine = k.batch_norm_affine(moments, p.weight, p.bias, unit.eps)
        return moments, affine

    def keep(self, i: int, y: Tensor, moments: Tensor, affine: Tensor) -> None:
        """Keep a unit's part of what :class:`fused_resnet.chain.spec.Saved` names."""
        self.moments[i] = moments
        self.kept[i] = [affine] if self.block.all_units[i].conv is None else [y, affine]
        weight = self.weights[i]
        if weight is not None and weight is not self.parameters[i].conv_weight:
            self.kept[i].append(weight)


def _check_batch(y: Tensor) -> None:
    if y.numel() == y.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}; use a larger "
            "batch or image, or call .eval() on the batch norm"
        )


def residual_like(residual: Tensor, y: Tensor, padding: int = 0) -> Tensor:
    """Return what a block's end adds to ``y``, dense; where it is padded, it has that many channels less."""
    return dense_like(_residual(residual, y.shape, y.dtype, padding), y)


def _residual(residual: Tensor, shape: torch.Size, dtype: torch.dtype, padding: int = 0) -> Tensor:
    """``residual`` in the shape of what it is added to."""
    if padding:
        shape = torch.Size((shape[0], shape[1] - padding, *shape[2:]))
    if residual.dtype == dtype and residual.shape == shape:
        return residual
    fits = torch.broadcast_shapes(residual.shape, shape) == shape and not (padding and residual.shape[1] != shape[1])
    if residual.dtype != dtype or not fits:
        raise ShortcutError(
            f"residual must have the dtype and shape of what it is added to, {dtype} {tuple(shape)}, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    return residual.expand(shape)
