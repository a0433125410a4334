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
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

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
from fused_resnet.ops.library import accumulation_dtype

# without the search for an overload that the packet makes in every call
_convolution_backward = torch.ops.aten.convolution_backward.default


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
    by_unit = split_parameters(chain, parameters)
    weights = _cast_weights(by_unit, x.dtype)
    running_stats = iter(running)
    saved: list[Tensor] = []
    moments: list[Tensor] = []

    def conv_norm(unit: Unit, p: Parameters, weight: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
        y = _dense(z if unit.conv is None else _conv(unit.conv, z, weight, p.conv_bias), k.channels_last)
        if unit.batch_stats:
            _check_batch(y)
            unit_moments, affine = k.batch_norm_stats(y, p.weight, p.bias, unit.eps)
        else:
            dtype = accumulation_dtype(y.dtype)
            mean, var = next(running_stats).to(dtype), next(running_stats).to(dtype)
            unit_moments = torch.stack((mean, var, var))
            affine = k.batch_norm_affine(unit_moments, p.weight, p.bias, unit.eps)
        moments.append(unit_moments)
        saved.extend([affine] if unit.conv is None else [y, affine])
        if weight is not None and weight is not p.conv_weight:
            saved.append(weight)
        return y, affine

    z = _dense(x, True) if k.channels_last else x  # then so is what a convolution makes of it
    *inner, end = zip(chain.units, by_unit, weights, strict=False)
    for unit, p, weight in inner:
        y, affine = conv_norm(unit, p, weight, z)
        z = k.batch_norm_act(y, affine, None, None, unit.relu)
    unit, p, weight = end
    y, affine = conv_norm(unit, p, weight, z)
    del z  # as early as the mathematics allows
    if chain.pool is not None:
        output, index = k.batch_norm_act_pool(y, affine, unit.relu, *map(list, chain.pool))
        saved.append(index)
        return output, moments, saved
    if chain.shortcut is None:
        return k.batch_norm_act(y, affine, None, None, unit.relu), moments, saved
    residual, residual_affine = x if shortcut is None else shortcut, None
    if isinstance(chain.shortcut, Unit):
        residual, residual_affine = conv_norm(chain.shortcut, by_unit[-1], weights[-1], residual)
    if isinstance(chain.shortcut, Padded):
        residual = chain.shortcut.pixels(residual)
    _, before, after = chain.padded
    residual = _residual_like(residual, y, before + after)
    output = k.batch_norm_act(y, affine, residual, residual_affine, unit.relu, before)
    return output, moments, saved


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
            grad = _dense_like(grad, self.index)
            grad = self.k.max_pool_backward(grad, self.index, size, *map(list, self.chain.pool))
        dy, d_source = self.end(grad, output)
        for i in range(last, 0, -1):
            dz = None if dy is None else self.conv(i, dy, self.z(i - 1))
            dy = None if dz is None else self.norm(i - 1, dz)
        dx = None if dy is None else self.conv(0, dy, self.x)
        if not self.separate and dx is not None:
            self.add_shortcut(dx, d_source, grad, output)
        flat = [
            gradient
            for parameters, gradients in zip(self.parameters, self.gradients, strict=True)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if parameter is not None
        ]
        return [dx if self.wants_x else None, d_source if self.separate and self.wants_shortcut else None, *flat]

    def end(self, grad: Tensor, z: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the last unit's ``dy`` and, where the shortcut is more than the chain's own input, its gradient."""
        last = len(self.chain.units) - 1
        if isinstance(self.chain.shortcut, Unit):
            dy, dy_side = self.branches([last, last + 1], grad, z)
            return dy, None if dy_side is None else self.conv(last + 1, dy_side, self.source)
        is_padded = isinstance(self.chain.shortcut, Padded)
        wants_masked = self.wants_shortcut if self.separate else is_padded and self.wants_x
        wants_masked = wants_masked and self.chain.shortcut is not None
        dy, masked = self.branches([last], grad, z, wants_masked, owns_grad=self.chain.pool is not None)
        if masked is not None and is_padded:
            return dy, self.pixels_gradient(masked)
        if masked is not None and masked.shape != self.source.shape:
            masked = masked.sum_to_size(self.source.shape)
        return dy, masked

    def pixels_gradient(self, masked: Tensor) -> Tensor:
        """Return the gradient of the pixels that a padded shortcut takes; of all, where its source is not ``x``."""
        padded = self.chain.padded
        masked = masked.sum_to_size(padded.pixels(self.source).shape)
        if not self.separate or masked.shape == self.source.shape:
            return masked
        d_source = torch.zeros_like(self.source)
        padded.pixels(d_source).copy_(masked)
        return d_source

    def add_shortcut(self, dx: Tensor, d_source: Tensor | None, grad: Tensor, output: Tensor | None) -> None:
        """Add to ``dx`` what the shortcut from the chain's own input brings back."""
        if d_source is not None:
            (self.chain.shortcut.pixels(dx) if isinstance(self.chain.shortcut, Padded) else dx).add_(d_source)
        elif self.chain.shortcut == IDENTITY:
            z = None if output is None else _dense_like(output, dx)
            self.k.add_masked_(dx, _dense_like(grad, dx), z, self.chain.units[-1].relu)

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
        first, relu = units[0], self.chain.units[units[0]].relu
        y, affine = self.y(first), self.saved[first].affine
        side = _dense_like(self.y(units[1]), y) if len(units) == 2 else None
        grad = _dense_like(grad, y)
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
            self.k.batch_norm_act_backward_(grad, y, affine, coefficients[0], z, relu)
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
        self.gradients[i] = self.gradients[i]._replace(
            weight=_as(grad_weight, parameters.weight) if wanted.weight else None,
            bias=_as(grad_bias, parameters.bias) if wanted.bias else None,
        )
        result: Tensor = coefficients
        return result

    def conv(self, i: int, dy: Tensor, z: Tensor) -> Tensor | None:
        """Keep the gradients of a unit's convolution, whose input was ``z``, and return ``dz`` if it is wanted."""
        unit, parameters, wanted = self.chain.all_units[i], self.parameters[i], self.wanted[i]
        if unit.conv is None:
            return dy
        if not self.wants_dy(i):
            return None
        stride, padding, dilation, groups, bias = unit.conv
        cast = self.saved[i].conv_weight
        weight = parameters.conv_weight if cast is None else cast
        dz: Tensor | None
        dz, dw, db = _convolution_backward(
            dy, z, weight, [weight.shape[0]] if bias else None, stride, padding, dilation, False, (0, 0), groups,
            [self.wants_input[i], bool(wanted.conv_weight), bool(wanted.conv_bias)],
        )  # fmt: skip
        self.gradients[i] = self.gradients[i]._replace(
            conv_weight=_as(dw, parameters.conv_weight) if wanted.conv_weight else None,
            conv_bias=_as(db, parameters.conv_bias) if wanted.conv_bias else None,
        )
        return dz if self.wants_input[i] else None

    def z(self, i: int) -> Tensor:
        """Rebuild what a unit gave the next one's weight gradient, or stand in for it where only its shape is read."""
        if not self.wanted[i + 1].conv_weight:
            return self.y(i)
        z: Tensor = self.k.batch_norm_act(self.y(i), self.saved[i].affine, None, None, self.chain.units[i].relu)
        return z

    def y(self, i: int) -> Tensor:
        """Return the input of a unit's batch norm."""
        y = self.saved[i].y
        return (
            y if y is not None else _dense(self.x if i < len(self.chain.units) else self.source, self.k.channels_last)
        )

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


def _residual_like(residual: Tensor, y: Tensor, padding: int) -> Tensor:
    """Return what is added to ``y``, dense; where it is padded, it has that many channels less."""
    shape = torch.Size((y.shape[0], y.shape[1] - padding, *y.shape[2:])) if padding else y.shape
    if residual.dtype == y.dtype and residual.shape == shape:
        return _in_format_of(residual, y) if padding else _dense_like(residual, y)
    fits = torch.broadcast_shapes(residual.shape, shape) == shape and not (padding and residual.shape[1] != shape[1])
    if residual.dtype != y.dtype or not fits:
        raise ValueError(
            f"residual must have the dtype and shape of what it is added to, {y.dtype} {tuple(shape)}, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    return _residual_like(residual.expand(shape), y, padding)


def _as(gradient: Any, parameter: Any) -> Tensor:
    """``gradient`` in the dtype of ``parameter``."""
    result: Tensor = gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
    return result


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` without gaps, in channels_last where the kernels take nothing else."""
    if channels_last:
        return x.contiguous(memory_format=torch.channels_last)
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _dense_like(x: Tensor, y: Tensor) -> Tensor:
    """``x`` without gaps and in the memory format of ``y``, which is dense, so that kernels walk both side by side."""
    return x if x.stride() == y.stride() else _in_format_of(x, y)


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    if y.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()
