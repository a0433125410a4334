"""The schedule of a chain of units: ``conv → batch norm → ReLU``, again and again, and a shortcut's add at the end.

A chain is one autograd node.  Between its units only the raw convolution outputs ``y`` and per-channel vectors are
kept for backward; the normalised activations ``z`` in between are temporary and rebuilt when a weight gradient needs
them.  :func:`forward` and :func:`backward` are written as mirror images; both are plain functions of tensors, made an
autograd node for eager mode and for the dispatcher in :mod:`fused_resnet.chain_ops`.

====================  =======================================================================
forward               backward
====================  =======================================================================
``y = conv(z, w)``    ``dz = dgrad(dy, w)``, ``dw = wgrad(dy, z)``, ``z`` rebuilt from ``y``
``mean, var of y``    ``dy = a·((G − g0) − k·(y − mean))`` from ``ΣG`` and ``ΣG·(y − mean)``
``z = act(a·y + b)``  ``G = dz`` where not ``z <= 0``, else 0
====================  =======================================================================

Behind an expanding 1×1 convolution at the end, ``y`` becomes ``z`` in place and backward does without it: see
:mod:`fused_resnet.ops.pointwise_conv_norm.reference`.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_resnet import synchronized
from fused_resnet.chain_spec import (
    IDENTITY,
    Chain,
    Conv,
    Padded,
    Parameters,
    Unit,
    split_parameters,
    split_saved,
    wants_input,
)
from fused_resnet.ops.library import accumulation_dtype, dense, dense_like, is_channels_last, rows
from fused_resnet.ops.pointwise_conv_norm.config import pays

# without the search for an overload that the packet makes in every call
_convolution_backward = torch.ops.aten.convolution_backward.default

# an activation, or the y, affine and relu that it is made of
Raw = tuple[Tensor, Tensor | None, bool]


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
        What the shortcut starts from where that is not ``x``.
    parameters
        Unit by unit, the projection last: conv weight, conv bias, γ, β, those that exist.
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
    saved
        What else backward needs: for every unit ``y``, affine, the weight where it was cast; last the pool's index.
    """
    schedule = _Forward(chain, parameters, running, x.dtype, k)
    output = schedule.run(x, shortcut)
    return output, schedule.moments, [tensor for tensors in schedule.saved for tensor in tensors]


def keeps_y(chain: Chain, i: int, weight: Tensor | None, engine: str) -> bool:
    """Whether backward needs the ``y`` of a unit: it can do without at the end, behind an expanding 1×1 convolution."""
    unit = chain.all_units[i]
    at_end = i >= len(chain.units) - 1 and chain.masks_by_output
    if weight is None or not (at_end and unit.batch_stats) or isinstance(chain.shortcut, Padded) or chain.synchronized:
        return True
    if unit.conv is None or unit.conv.bias or not is_pointwise(unit, weight):
        return True
    if i < len(chain.units) and unit.conv.stride != (1, 1):
        return True
    outputs, inputs = weight.shape[:2]
    return not pays(engine, chain.options.memory, inputs, outputs, weight.itemsize)


def is_pointwise(unit: Unit, weight: Tensor | None) -> bool:
    """Whether a unit's convolution is a product of matrices: every pixel's channels by the weight."""
    if unit.conv is None or weight is None:
        return False
    return weight.shape[2:] == (1, 1) and unit.conv.padding == (0, 0) and unit.conv.groups == 1


class _Forward:
    """One forward pass; ``moments`` and ``saved`` fill as it goes, unit by unit and last what the pool saves."""

    def __init__(
        self,
        chain: Chain,
        parameters: Sequence[Tensor],
        running: Sequence[Tensor],
        dtype: torch.dtype,
        k: SimpleNamespace,
    ):
        self.chain, self.k = chain, k
        self.parameters = split_parameters(chain, parameters)
        self.weights = _cast_weights(self.parameters, dtype)
        stats = iter(running)
        self.running = [() if unit.batch_stats else (next(stats), next(stats)) for unit in chain.all_units]
        self.moments: list[Any] = [None] * len(chain.all_units)
        self.saved: list[list[Tensor]] = [[] for _ in chain.all_units]

    def run(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        last = len(self.chain.units) - 1
        raw: Raw = (dense(x, True) if self.k.channels_last else x, None, False)
        for i in range(last):
            raw = (*self.conv_norm(i, self.activation(*raw)), self.chain.units[i].relu)
        if self.chain.shortcut is not None:
            return self.end(raw, x if shortcut is None else shortcut)
        y, affine = self.conv_norm(last, self.activation(*raw))
        relu = self.chain.units[last].relu
        output: Tensor
        if self.chain.pool is None:
            output = self.k.batch_norm_act(y, affine, None, None, relu)
        else:
            output, index = self.k.batch_norm_act_pool(y, affine, relu, *map(list, self.chain.pool))
            self.saved.append([index])
        return output

    def end(self, raw: Raw, residual: Tensor) -> Tensor:
        """Run the last unit and add the shortcut, which starts from ``residual``."""
        last = len(self.chain.units) - 1
        unit, p, weight, residual_affine = self.chain.units[last], self.parameters[last], self.weights[last], None
        if isinstance(self.chain.shortcut, Unit):
            residual, residual_affine = self.conv_norm(last + 1, residual, self.keeps_y(last + 1))
        elif isinstance(self.chain.shortcut, Padded):
            residual = self.chain.pixels(residual)
        _, before, after = self.chain.padded
        output: Tensor
        if weight is None or self.keeps_y(last):
            y, affine = self.conv_norm(last, self.activation(*raw))
            residual = dense_like(_residual(residual, y.shape, y.dtype, before + after), y)
            output = self.k.batch_norm_act(y, affine, residual, residual_affine, unit.relu, before)
            return output
        x = raw[0]
        _check_batch(x)
        shape = torch.Size((x.shape[0], weight.shape[0], *x.shape[2:]))
        residual = dense(_residual(residual, shape, x.dtype), self.k.channels_last)
        output, moments, affine = self.k.pointwise_conv_norm_act(
            *raw, weight, p.weight, p.bias, unit.eps, residual, residual_affine, unit.relu
        )
        self.keep(last, output.new_empty(0), moments, affine)
        return output

    def keeps_y(self, i: int) -> bool:
        return keeps_y(self.chain, i, self.weights[i], self.k.engine)

    def activation(self, y: Tensor, affine: Tensor | None, relu: bool) -> Tensor:
        """Return ``act(a·y + b)``, or ``y`` where that is an activation already."""
        z: Tensor = y if affine is None else self.k.batch_norm_act(y, affine, None, None, relu)
        return z

    def conv_norm(self, i: int, z: Tensor, keeps_y: bool = True) -> tuple[Tensor, Tensor]:
        """Return a unit's ``y`` and affine, and keep what backward needs of it."""
        unit, p, k = self.chain.all_units[i], self.parameters[i], self.k
        y = dense(z if unit.conv is None else _conv(unit.conv, z, self.weights[i], p.conv_bias), k.channels_last)
        if unit.group is not None:
            moments, affine = synchronized.batch_norm_stats(y, p.weight, p.bias, unit.eps, unit.group, k)
        elif unit.batch_stats:
            _check_batch(y)
            moments, affine = k.batch_norm_stats(y, p.weight, p.bias, unit.eps)
        else:
            mean, var = (stat.to(accumulation_dtype(y.dtype)) for stat in self.running[i])
            moments = torch.stack((mean, var, var))
            affine = k.batch_norm_affine(moments, p.weight, p.bias, unit.eps)
        self.keep(i, y if keeps_y else y.new_empty(0), moments, affine)
        return y, affine

    def keep(self, i: int, y: Tensor, moments: Tensor, affine: Tensor) -> None:
        """Keep a unit's part of what :class:`Saved` names."""
        self.moments[i] = moments
        self.saved[i] = [affine] if self.chain.all_units[i].conv is None else [y, affine]
        weight = self.weights[i]
        if weight is not None and weight is not self.parameters[i].conv_weight:
            self.saved[i].append(weight)


def backward(
    chain: Chain,
    grad: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    output: Tensor | None,
    parameters: Sequence[Tensor],
    moments: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs_grad: Sequence[bool],
    k: SimpleNamespace,
) -> list[Tensor | None]:
    """Return the gradients of ``x``, ``shortcut`` and ``parameters``, None where ``needs_grad`` is false.

    ``output`` is the chain's output where :attr:`Chain.masks_by_output`; the rest is as in :func:`forward`.
    """
    return _Backward(chain, x, shortcut, parameters, moments, saved, needs_grad, k).run(grad, output)


class _Backward:
    """One backward pass; a step is skipped where nothing behind it wants a gradient."""

    def __init__(
        self,
        chain: Chain,
        x: Tensor,
        shortcut: Tensor | None,
        parameters: Sequence[Tensor],
        moments: Sequence[Tensor],
        saved: Sequence[Tensor],
        needs_grad: Sequence[bool],
        k: SimpleNamespace,
    ):
        self.chain, self.k, self.x = chain, k, x
        self.source = x if shortcut is None else shortcut
        self.separate = shortcut is not None
        self.wants_x, self.wants_shortcut, *wants = needs_grad
        self.wanted = split_parameters(chain, wants)
        self.wants_input = wants_input(chain, needs_grad, shortcut)
        self.parameters = split_parameters(chain, parameters)
        self.moments = moments
        self.saved = split_saved(chain, x, self.parameters, saved)
        self.index = saved[-1]  # of the pool, if there is one
        self.gradients = [Parameters(None, None, None, None)] * len(self.parameters)

    def run(self, grad: Tensor, output: Tensor | None) -> list[Tensor | None]:
        last = len(self.chain.units) - 1
        if self.chain.pool is not None:
            size = self.y(last).shape[2:]
            grad = dense_like(grad, self.index)
            grad = self.k.max_pool_backward(grad, self.index, size, *map(list, self.chain.pool))
        if output is not None and any(kept.lacks_y for kept in self.saved[last:]):
            dz, d_source = self.end_without_y(grad, output)
        else:
            dz, d_source = self.end(grad, output)
        for i in range(last - 1, 0, -1):
            dy = None if dz is None else self.norm(i, dz)
            dz = None if dy is None else self.conv(i, dy)
        if last > 0:
            dz = self.first(dz, d_source)
        if not self.separate and dz is not None and dz is not d_source:
            self.add_shortcut(dz, d_source, grad, output)
        flat = [
            gradient
            for parameters, gradients in zip(self.parameters, self.gradients, strict=True)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if parameter is not None
        ]
        return [dz if self.wants_x else None, d_source if self.separate and self.wants_shortcut else None, *flat]

    def end(self, grad: Tensor, z: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the last unit's ``dz`` and, where the shortcut is more than the chain's own input, its gradient."""
        last, shortcut = len(self.chain.units) - 1, self.chain.shortcut
        if isinstance(shortcut, Unit):
            dy, d_source = self.branches([last, last + 1], grad, z)
            d_source = None if d_source is None else self.conv(last + 1, d_source)
        else:
            wants_masked = self.wants_shortcut if self.separate else self.wants_x and self.takes_masked()
            wants_masked = wants_masked and shortcut is not None
            dy, d_source = self.branches([last], grad, z, wants_masked, owns_grad=self.chain.pool is not None)
            d_source = None if d_source is None else self.of_source(d_source)
        return None if dy is None else self.conv(last, dy), d_source

    def end_without_y(self, grad: Tensor, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Do what :meth:`end` does where the ``y`` of a branch was not kept: ``G`` is written once and read by both."""
        last = len(self.chain.units) - 1
        masked, sum_grad = self.k.masked_grad(dense_like(grad, z), z)

        def branch(i: int) -> Tensor | None:
            if self.saved[i].lacks_y:
                return self.pointwise_conv_norm(i, masked, sum_grad)
            dy, _ = self.branches([i], masked, z)
            return None if dy is None else self.conv(i, dy)

        dz = branch(last)
        d_source = branch(last + 1) if isinstance(self.chain.shortcut, Unit) else masked
        return dz, None if d_source is None else self.of_source(d_source)

    def pointwise_conv_norm(self, i: int, masked: Tensor, sum_grad: Tensor) -> Tensor | None:
        """Keep the gradients of a unit whose ``y`` was not kept, and return its ``dz`` if that is wanted.

        Where the convolution has a stride, ``dz`` is of the pixels that it read.
        """
        unit, p, wanted = self.chain.all_units[i], self.parameters[i], self.wanted[i]
        gradients = Parameters(None, None, None, _as(sum_grad, p.bias) if wanted.bias else None)
        dz = None
        if self.wants_dy(i) or wanted.weight:
            x, affine, relu = self.raw(i)
            x = dense(x if i < len(self.chain.units) else self.chain.pixels(x), self.k.channels_last)
            weight, wants_input = self.weight(i), self.wants_input[i]
            dz, d_weight, grad_weight, _ = self.k.pointwise_conv_norm_backward(
                masked, sum_grad, x, affine, None, relu, weight, self.moments[i], p.weight, unit.eps, wants_input
            )
            gradients = gradients._replace(
                conv_weight=_as(d_weight, p.conv_weight) if wanted.conv_weight else None,
                weight=_as(grad_weight, p.weight) if wanted.weight else None,
            )
        self.gradients[i] = gradients
        return dz if self.wants_input[i] else None

    def first(self, dz: Tensor | None, d_source: Tensor | None) -> Tensor | None:
        """Return ``dx`` from the first unit's ``dz``: the shortcut's gradient itself, where a product is added to that.

        A product that adds reads and writes a gradient once.  As wide as a block's input is, that is a third of what a
        convolution and an addition behind it move.
        """
        dy = None if dz is None else self.norm(0, dz)
        if dy is None or d_source is None or not self.wants_x or not self.adds_product(dy, d_source):
            return None if dy is None else self.conv(0, dy)
        weight = self.weight(0)
        rows(d_source).addmm_(rows(dy), weight.flatten(1))
        if self.wanted[0].conv_weight or self.wanted[0].conv_bias:
            self.conv(0, dy, wants_input=False)
        return d_source

    def takes_masked(self) -> bool:
        """Whether the gradient behind the last ReLU is of use to a shortcut from the chain's own input."""
        if self.chain.shortcut == IDENTITY:
            first, last = self.y(0), self.y(len(self.chain.units) - 1)
            return self.chain.masks_by_output and len(self.chain.units) > 1 and self.adds_product(first, last)
        return isinstance(self.chain.shortcut, Padded)

    def adds_product(self, dy: Tensor, d_source: Tensor) -> bool:
        """Whether the first convolution is a product of matrices that can be added to the shortcut's gradient."""
        unit = self.chain.units[0]
        if self.separate or unit.conv is None or unit.conv.stride != (1, 1) or d_source.shape != self.x.shape:
            return False
        return is_pointwise(unit, self.weight(0)) and is_channels_last(dy) and is_channels_last(d_source)

    def of_source(self, d_pixels: Tensor) -> Tensor:
        """Return the gradient of a shortcut's source from that of its pixels, which may have been broadcast.

        Where the source is ``x``, :meth:`add_shortcut` puts them in their places.
        """
        if d_pixels.shape == self.source.shape:
            return d_pixels
        d_pixels = d_pixels.sum_to_size(self.chain.pixels(self.source).shape)
        if not self.separate or d_pixels.shape == self.source.shape:
            return d_pixels
        d_source = torch.zeros_like(self.source)
        self.chain.pixels(d_source).copy_(d_pixels)
        return d_source

    def add_shortcut(self, dx: Tensor, d_source: Tensor | None, grad: Tensor, output: Tensor | None) -> None:
        """Add to ``dx`` what the shortcut from the chain's own input brings back."""
        if d_source is not None:
            (dx if d_source.shape == dx.shape else self.chain.pixels(dx)).add_(d_source)
        elif self.chain.shortcut == IDENTITY:
            z = None if output is None else dense_like(output, dx)
            self.k.add_masked_(dx, dense_like(grad, dx), z, self.chain.units[-1].relu)

    def norm(self, i: int, dz: Tensor) -> Tensor | None:
        """Return ``dy`` of a unit inside the chain."""
        return self.branches([i], dz, None, owns_grad=True)[0]

    def branches(
        self,
        units: list[int],
        grad: Tensor,
        z: Tensor | None,
        wants_masked: bool = False,
        owns_grad: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Take one activation's gradient through its batch norm, or through the two that end in one add.

        Returns ``dy``, and the second branch's ``dy`` or, where ``wants_masked``, ``G``.  A gradient that nobody else
        holds (``owns_grad``) gives its memory to ``dy``.
        """
        first, relu = units[0], self.chain.all_units[units[0]].relu
        y, affine = self.y(first), self.saved[first].affine
        side = dense_like(self.y(units[1]), y) if len(units) == 2 else None
        grad = dense_like(grad, y)
        wants_dy = any(map(self.wants_dy, units))
        sums = None
        if any(w.weight or w.bias for w in (self.wanted[i] for i in units)) or (
            wants_dy and any(self.chain.all_units[i].batch_stats for i in units)
        ):
            side_moments = None if side is None else self.moments[units[1]]
            sums = self.k.batch_norm_act_reduce(grad, y, self.moments[first], affine, z, side, side_moments, relu)
        count = y.numel() // y.shape[1]
        coefficients = [self.coefficients(i, branch, sums, count) for branch, i in enumerate(units)]
        if not wants_dy and not wants_masked:
            return None, None
        if owns_grad:
            self.k.batch_norm_act_backward_(grad, y, affine, coefficients[0], z, relu, False)
            return grad, None
        side_coefficients = coefficients[1] if side is not None else None
        _, before, after = self.chain.padded
        masked_channels = y.shape[1] - before - after if wants_masked else 0
        dy, second = self.k.batch_norm_act_backward(
            grad, y, affine, coefficients[0], z, side, side_coefficients, relu, masked_channels, before
        )
        return dy, second if side is not None or wants_masked else None

    def coefficients(self, i: int, branch: int, sums: Tensor | None, count: int) -> Tensor:
        """Keep a unit's ``dγ`` and ``dβ`` and return the coefficients of its ``dy``."""
        unit, parameters, wanted, moments = self.chain.all_units[i], self.parameters[i], self.wanted[i], self.moments[i]
        if sums is None:
            sums = moments.new_zeros(2 * branch + 2, moments.shape[1])
        grad_weight, grad_bias, coefficients = self.k.batch_norm_coefficients(
            sums, branch, moments, parameters.weight, unit.eps, count, unit.batch_stats
        )
        if unit.group is not None and self.wants_dy(i):
            mean_sums = synchronized.mean_sums(sums[2 * branch : 2 * branch + 2], count, unit.group)
            *_, coefficients = self.k.batch_norm_coefficients(
                mean_sums, 0, moments, parameters.weight, unit.eps, 1, unit.batch_stats
            )
        self.gradients[i] = self.gradients[i]._replace(
            weight=_as(grad_weight, parameters.weight) if wanted.weight else None,
            bias=_as(grad_bias, parameters.bias) if wanted.bias else None,
        )
        result: Tensor = coefficients
        return result

    def conv(self, i: int, dy: Tensor, wants_input: bool = True) -> Tensor | None:
        """Keep the gradients of a unit's convolution and return its ``dz`` if that is wanted."""
        unit, parameters, wanted = self.chain.all_units[i], self.parameters[i], self.wanted[i]
        if unit.conv is None:
            return dy
        if not self.wants_dy(i):
            return None
        stride, padding, dilation, groups, bias = unit.conv
        weight, wants_input = self.weight(i), wants_input and self.wants_input[i]
        dz: Tensor | None
        dz, dw, db = _convolution_backward(
            dy, self.z(i), weight, [weight.shape[0]] if bias else None, stride, padding, dilation, False, (0, 0),
            groups, [wants_input, bool(wanted.conv_weight), bool(wanted.conv_bias)],
        )  # fmt: skip
        self.gradients[i] = self.gradients[i]._replace(
            conv_weight=_as(dw, parameters.conv_weight) if wanted.conv_weight else None,
            conv_bias=_as(db, parameters.conv_bias) if wanted.conv_bias else None,
        )
        return dz if wants_input else None

    def weight(self, i: int) -> Tensor:
        """Return the weight of a unit's convolution in the dtype of the activations."""
        cast = self.saved[i].conv_weight
        weight: Tensor = self.parameters[i].conv_weight if cast is None else cast
        return weight

    def raw(self, i: int) -> Raw:
        """Return what the input of a unit's convolution is made of."""
        if i in (0, len(self.chain.units)):
            return self.x if i == 0 else self.source, None, False
        return self.y(i - 1), self.saved[i - 1].affine, self.chain.units[i - 1].relu

    def z(self, i: int) -> Tensor:
        """Return the input of a unit's convolution: rebuilt, or stood in for where only its shape is read."""
        y, affine, relu = self.raw(i)
        if affine is None or not self.wanted[i].conv_weight:
            return y
        z: Tensor = self.k.batch_norm_act(y, affine, None, None, relu)
        return z

    def y(self, i: int) -> Tensor:
        """Return the input of a unit's batch norm."""
        y = self.saved[i].y
        return y if y is not None else dense(self.x if i < len(self.chain.units) else self.source, self.k.channels_last)

    def wants_dy(self, i: int) -> bool:
        """Whether the gradient of a unit's batch norm's input leads anywhere."""
        return self.wants_input[i] or bool(self.wanted[i].conv_weight or self.wanted[i].conv_bias)


def _cast_weights(by_unit: list[Parameters], dtype: torch.dtype) -> list[Tensor | None]:
    """Return every unit's convolution weight in ``dtype``: the parameter itself, or a cast, in one call for all."""
    stale = {
        i: p.conv_weight for i, p in enumerate(by_unit) if p.conv_weight is not None and p.conv_weight.dtype != dtype
    }
    cast = {i: torch.empty_like(weight, dtype=dtype) for i, weight in stale.items()}
    if cast:
        torch._foreach_copy_(list(cast.values()), list(stale.values()))
    return [cast.get(i, p.conv_weight) for i, p in enumerate(by_unit)]


def _conv(conv: Conv, z: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.to(z.dtype)
    return torch.conv2d(z, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _check_batch(y: Tensor) -> None:
    if y.numel() == y.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}; use a larger "
            "batch or image, or call .eval() on the batch norm"
        )


def _residual(residual: Tensor, shape: torch.Size, dtype: torch.dtype, padding: int = 0) -> Tensor:
    """``residual`` in the shape of what it is added to; where it is padded, it has that many channels less."""
    if padding:
        shape = torch.Size((shape[0], shape[1] - padding, *shape[2:]))
    if residual.dtype == dtype and residual.shape == shape:
        return residual
    fits = torch.broadcast_shapes(residual.shape, shape) == shape and not (padding and residual.shape[1] != shape[1])
    if residual.dtype != dtype or not fits:
        raise ValueError(
            f"residual must have the dtype and shape of what it is added to, {dtype} {tuple(shape)}, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    return residual.expand(shape)


def _as(gradient: Any, parameter: Any) -> Tensor:
    """``gradient`` in the dtype of ``parameter``, and in its strides where they are the same memory's.

    The stride of a side of one element means nothing, but DistributedDataParallel compares it.
    """
    result: Tensor = gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
    theirs, strides = result.stride(), parameter.stride()
    if theirs != strides and all(a == b or n == 1 for a, b, n in zip(theirs, strides, parameter.shape, strict=True)):
        result = result.as_strided(parameter.shape, strides)
    return result
