"""The schedule of a chain of units: ``conv → batch norm → ReLU``, again and again, and a shortcut's add at the end.

A chain is one autograd node.  Between its units only the raw convolution outputs ``y`` and per-channel vectors are
kept for backward; the normalised activations ``z`` in between are temporary and rebuilt when a weight gradient needs
them.  :func:`forward` and :func:`backward` are written as mirror images; both are plain functions of tensors, made an
autograd node for eager mode and for the dispatcher in :mod:`fused_resnet.chain_ops`.

====================  =======================================================================
forward               backward
====================  =======================================================================
``y = conv(z, w)``    ``dz = dgrad(dy, w)``, ``dw = wgrad(dy, z)``, ``z`` rebuilt from ``y``
``mean, var of y``    ``dy = a·G + c1·y + c0`` from ``ΣG`` and ``ΣG·(y − mean)``
``z = act(a·y + b)``  ``G = dz`` where not ``z <= 0``, else 0
====================  =======================================================================
"""

import ast
import functools
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]

IDENTITY = "identity"


class Conv(NamedTuple):
    """The geometry of a 2-d convolution with zero padding."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    bias: bool


class Unit(NamedTuple):
    """``conv → batch norm → act``; without ``conv`` the norm reads the unit's input itself."""

    conv: Conv | None
    weight: bool
    bias: bool
    batch_stats: bool
    eps: float
    relu: bool


class Pool(NamedTuple):
    """The geometry of a 2-d max pool."""

    kernel_size: Pair
    stride: Pair
    padding: Pair


class Chain(NamedTuple):
    """What a chain computes.

    Attributes
    ----------
    units
        The main path, in order.  With a shortcut, the last unit's ReLU comes after the add.
    shortcut
        None, :data:`IDENTITY`, or the unit of a projection (conv → batch norm, no ReLU).
    pool
        A max pool behind the last unit, or None.
    engine
        Name of the engine, or ``"auto"``.
    """

    units: tuple[Unit, ...]
    shortcut: Unit | str | None
    pool: Pool | None
    engine: str

    @property
    def all_units(self) -> tuple[Unit, ...]:
        """The main path, and the projection behind it."""
        return (*self.units, self.shortcut) if isinstance(self.shortcut, Unit) else self.units

    @property
    def masks_by_output(self) -> bool:
        """Whether backward takes the last ReLU's mask from the chain's output: behind an add ``y`` alone can't say."""
        return self.shortcut is not None and self.units[-1].relu


@functools.cache
def make_chain(signature: tuple[Any, ...]) -> Chain:
    """Name the parts of a chain given as nested plain tuples (which a traced program can build and print)."""
    units, shortcut, pool, engine = signature
    if isinstance(shortcut, tuple):
        shortcut = _make_unit(shortcut)
    return Chain(tuple(map(_make_unit, units)), shortcut, Pool(*pool) if pool else None, engine)


def _make_unit(signature: tuple[Any, ...]) -> Unit:
    conv, *rest = signature
    return Unit(Conv(*conv) if conv else None, *rest)


@functools.cache
def parse_chain(signature: str) -> Chain:
    """Read a chain from the ``repr`` of its signature."""
    return make_chain(ast.literal_eval(signature))


class Parameters(NamedTuple):
    """What a unit has one of for each parameter: the parameters, their gradients, or whether those are wanted."""

    conv_weight: Any
    conv_bias: Any
    weight: Any
    bias: Any


class Saved(NamedTuple):
    """What a unit keeps for backward; ``y`` is None where the unit has no conv, ``weight`` unless it was cast."""

    y: Tensor | None
    moments: Tensor
    affine: Tensor
    conv_weight: Tensor | None


def split_parameters(chain: Chain, flat: Iterable[Any]) -> list[Parameters]:
    """Group a flat list, one item for each parameter that the units have, by unit."""
    items = iter(flat)
    return [
        Parameters(
            *(
                next(items) if present else None
                for present in (unit.conv is not None, unit.conv and unit.conv.bias, unit.weight, unit.bias)
            )
        )
        for unit in chain.all_units
    ]


def split_saved(chain: Chain, x: Tensor, parameters: list[Parameters], flat: Iterable[Tensor]) -> list[Saved]:
    """Group the flat list of saved tensors by unit."""
    items = iter(flat)
    return [
        Saved(
            next(items) if unit.conv else None,
            next(items),
            next(items),
            next(items) if unit.conv and p.conv_weight.dtype != x.dtype else None,
        )
        for unit, p in zip(chain.all_units, parameters, strict=True)
    ]


def wants_input(chain: Chain, needs_grad: Sequence[bool], shortcut: Tensor | None) -> list[bool]:
    """Return for every unit whether anything in front of it wants a gradient; ``needs_grad`` as in :func:`backward`."""
    wants_x, wants_shortcut, *wants = needs_grad
    in_front = [wants_x]
    for unit in split_parameters(chain, wants)[: len(chain.units) - 1]:
        in_front.append(in_front[-1] or any(unit))
    return [*in_front, wants_x if shortcut is None else wants_shortcut][: len(chain.all_units)]


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
    saved
        What backward needs: for every unit ``y``, moments, affine, the weight where it was cast; last the pool's index.
    stats
        For every unit that normalises by its batch the mean and *unbiased* variance [2, C], which the running
        statistics move towards.
    """
    by_unit = split_parameters(chain, parameters)
    weights = _cast_weights(by_unit, x.dtype)
    running_stats = iter(running)
    saved: list[Tensor] = []
    stats: list[Tensor] = []

    def conv_norm(unit: Unit, p: Parameters, weight: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
        y = _dense(z) if unit.conv is None else _conv(unit.conv, z, weight, p.conv_bias)
        if unit.batch_stats:
            _check_batch(y)
            moments = k.batch_norm_stats(y)
            stats.append(_unbiased(moments, y.numel() // y.shape[1]))
        else:
            dtype = torch.float64 if y.dtype is torch.float64 else torch.float32
            moments = torch.stack((next(running_stats).to(dtype), next(running_stats).to(dtype)))
        affine = k.batch_norm_affine(moments, p.weight, p.bias, unit.eps)
        saved.extend([moments, affine] if unit.conv is None else [y, moments, affine])
        if weight is not p.conv_weight:
            saved.append(weight)
        return y, affine

    z = x
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
        return output, saved, stats
    residual = residual_affine = None
    if chain.shortcut is not None:
        residual = x if shortcut is None else shortcut
    if isinstance(chain.shortcut, Unit):
        residual, residual_affine = conv_norm(chain.shortcut, by_unit[-1], weights[-1], residual)
    if residual is not None:
        _check_residual(residual, y)
        residual = _dense_like(residual, y)
    return k.batch_norm_act(y, affine, residual, residual_affine, unit.relu), saved, stats


def backward(
    chain: Chain,
    grad: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    output: Tensor | None,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs_grad: Sequence[bool],
    k: SimpleNamespace,
) -> list[Tensor | None]:
    """Return the gradients of ``x``, ``shortcut`` and ``parameters``, None where ``needs_grad`` is false.

    ``output`` is the chain's output where :attr:`Chain.masks_by_output`; the rest is as in :func:`forward`.
    """
    wants_x, wants_shortcut, *wants = needs_grad
    wanted = split_parameters(chain, wants)
    by_unit = split_parameters(chain, parameters)
    kept = split_saved(chain, x, by_unit, saved)
    gradients: list[Parameters] = [Parameters(None, None, None, None)] * len(by_unit)

    source = x if shortcut is None else shortcut

    def y_of(i: int) -> Tensor:
        if kept[i].y is not None:
            return kept[i].y
        return _dense(x if i < len(chain.units) else source)

    def norm(
        branches: list[int], grad: Tensor, z: Tensor | None, relu: bool, wants_y: bool, wants_masked: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """``G``, its sums, dγ, dβ and ``dy`` of a unit, or of two that end in one add; returns (dy, second)."""
        i, j = branches[0], branches[1] if len(branches) > 1 else None
        y, moments, affine = y_of(i), kept[i].moments, kept[i].affine
        y_j, moments_j = (None, None) if j is None else (_dense_like(y_of(j), y), kept[j].moments)
        grad = _dense_like(grad, y)
        masked = None
        if any(wanted[b].weight or wanted[b].bias or (wants_y and chain.all_units[b].batch_stats) for b in branches):
            sums, written = k.batch_norm_act_reduce(grad, y, moments, affine, z, y_j, moments_j, relu, wants_masked)
            if wants_masked:  # the mask is applied: the second pass reads one tensor less
                grad, masked, z, relu = written, written, None, False
        else:
            sums = moments.new_zeros(2 * len(branches), moments.shape[1])
        coefficients = []
        for b, sums_b in zip(branches, sums.split(2), strict=True):
            unit, p, w = chain.all_units[b], by_unit[b], wanted[b]
            count = y.numel() // y.shape[1]
            (grad_weight, grad_bias), coefficients_b = k.batch_norm_coefficients(
                sums_b, kept[b].moments, p.weight, unit.eps, count, unit.batch_stats
            )
            coefficients.append(coefficients_b)
            gradients[b] = gradients[b]._replace(
                weight=grad_weight.to(p.weight.dtype) if w.weight else None,
                bias=grad_bias.to(p.bias.dtype) if w.bias else None,
            )
        write_masked = wants_masked and masked is None
        if not wants_y and not write_masked:
            return None, masked
        coefficients_j = None if j is None else coefficients[1]
        dy, second = k.batch_norm_act_backward(
            grad, y, affine, coefficients[0], z, y_j, coefficients_j, relu, write_masked
        )
        return dy, masked if j is None and not write_masked else second

    def conv(i: int, dy: Tensor | None, z: Tensor | Callable[[], Tensor], wants_z: bool) -> Tensor | None:
        """``dz``, ``dw`` and the bias's gradient of a unit's convolution; ``z`` may be rebuilt, if it is needed."""
        unit, p, w = chain.all_units[i], by_unit[i], wanted[i]
        if unit.conv is None or dy is None:
            return dy
        if not (wants_z or w.conv_weight or w.conv_bias):
            return None
        stride, padding, dilation, groups, bias = unit.conv
        weight = p.conv_weight if kept[i].conv_weight is None else kept[i].conv_weight
        mask = [wants_z, bool(w.conv_weight), bool(w.conv_bias)]
        dz, dw, db = torch.ops.aten.convolution_backward(
            dy, z() if callable(z) else z, weight, [weight.shape[0]] if bias else None,
            stride, padding, dilation, False, (0, 0), groups, mask,
        )  # fmt: skip
        gradients[i] = gradients[i]._replace(
            conv_weight=dw.to(p.conv_weight.dtype) if w.conv_weight else None,
            conv_bias=db.to(p.conv_bias.dtype) if w.conv_bias else None,
        )
        return dz

    def rebuild(i: int) -> Tensor:
        return k.batch_norm_act(y_of(i), kept[i].affine, None, None, chain.units[i].relu)

    in_front = wants_input(chain, needs_grad, shortcut)

    def wants_y(i: int, wants_z: bool) -> bool:
        return wants_z or bool(wanted[i].conv_weight or wanted[i].conv_bias)

    last = len(chain.units) - 1
    wants_source = bool(chain.shortcut is not None and (wants_x if shortcut is None else wants_shortcut))
    relu = chain.units[last].relu
    dx = d_source = None

    if chain.pool is not None:
        grad = k.max_pool_backward(grad, saved[-1], y_of(last).shape[2:], *map(list, chain.pool))
    if isinstance(chain.shortcut, Unit):
        end = wants_y(last, in_front[last]) or wants_y(last + 1, wants_source)
        dz, d_side = norm([last, last + 1], grad, output, relu, end, False)
        d_source = conv(last + 1, d_side, source, wants_source)
    else:
        dz, d_source = norm([last], grad, output, relu, wants_y(last, in_front[last]), wants_source)
    for i in range(last, 0, -1):
        if dz is None:
            break
        # the weight's gradient reads the activation in front of it, which was never kept
        z = functools.partial(rebuild, i - 1) if wanted[i].conv_weight else y_of(i - 1)
        dz = conv(i, dz, z, in_front[i])
        if dz is not None:
            dz, _ = norm([i - 1], dz, None, chain.units[i - 1].relu, wants_y(i - 1, in_front[i - 1]), False)
    dx = conv(0, dz, x, wants_x)

    if shortcut is None and wants_x and d_source is not None:
        dx, d_source = d_source if dx is None else dx.add_(d_source), None
    flat = [
        gradient
        for p, unit_gradients in zip(by_unit, gradients, strict=True)
        for parameter, gradient in zip(p, unit_gradients, strict=True)
        if parameter is not None
    ]
    return [dx if wants_x else None, d_source if wants_shortcut else None, *flat]


def _cast_weights(by_unit: list[Parameters], dtype: torch.dtype) -> list[Tensor | None]:
    """Every unit's convolution weight in ``dtype``: the parameter itself where it is, else cast in one call for all."""
    weights = [p.conv_weight for p in by_unit]
    stale = [i for i, weight in enumerate(weights) if weight is not None and weight.dtype != dtype]
    if stale:
        cast = [torch.empty_like(weights[i], dtype=dtype) for i in stale]
        torch._foreach_copy_(cast, [weights[i] for i in stale])
        for i, weight in zip(stale, cast, strict=True):
            weights[i] = weight
    return weights


def _conv(conv: Conv, z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.to(z.dtype)
    return torch.conv2d(z, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _unbiased(moments: Tensor, count: int) -> Tensor:
    mean, var = moments
    return torch.stack((mean, var * (count / (count - 1))))


def _check_batch(y: Tensor) -> None:
    if y.numel() == y.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(y.shape)}; use a larger "
            "batch or image, or call .eval() on the batch norm"
        )


def _check_residual(residual: Tensor, y: Tensor) -> None:
    if residual.shape != y.shape or residual.dtype != y.dtype or residual.device != y.device:
        raise ValueError(
            f"residual must have the shape, dtype and device of what it is added to, {tuple(y.shape)} {y.dtype} on "
            f"{y.device}, got {tuple(residual.shape)} {residual.dtype} on {residual.device}"
        )


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _dense_like(x: Tensor, y: Tensor) -> Tensor:
    """``x`` without gaps and in the memory format of ``y``, so that kernels walk both side by side."""
    channels_last = y.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
