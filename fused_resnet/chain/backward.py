"""One block of a chain, backward: the mirror image of :mod:`fused_resnet.chain.forward`.

What comes in and what goes out is the gradient of an activation (:class:`Gradient`).  Between the blocks of a chain it
is *masked*: the kernel that makes it applies the mask of the ReLU in front and adds it up for the batch norm in front
of that, so that the widest tensors of a network are not read once more.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.chain import synchronized
from fused_resnet.chain.forward import Raw, is_pointwise, makes_sums, residual_like
from fused_resnet.chain.spec import IDENTITY, Block, Padded, Parameters, Saved, Unit
from fused_resnet.ops.activation import NONE, Act
from fused_resnet.ops.library import dense, dense_like, is_channels_last, rows
from fused_resnet.ops.pointwise_conv.config import makes_weight_gradient

# without the search for an overload that the packet makes in every call
_convolution_backward = torch.ops.aten.convolution_backward.default


class Gradient(NamedTuple):
    """The gradient of a block's output or input [N, C, H, W].

    Attributes
    ----------
    grad
        The gradient; where there is a ``sum``, masked by the ReLU that the activation comes out of.
    sum
        [C], over the pixels, or None.
    owned
        Whether nobody else holds ``grad``, so that it may be written over; so it is where it is masked.
    """

    grad: Tensor
    sum: Tensor | None
    owned: bool = True


class Behind(NamedTuple):
    """What a unit hands to the norm in front of its convolution.

    Attributes
    ----------
    dz
        The gradient of the convolution's input, None where nobody in front wants it.
    sums
        [2, C], the norm's sums, where the kernel that made ``dz`` made them, too.
    dy
        The gradient of its own ``y``, where its weight gradient still waits for the convolution's input.
    """

    dz: Tensor | None
    sums: Tensor | None
    dy: Tensor | None


class BlockBackward:
    """One backward pass; a step is skipped where nothing behind it wants a gradient.

    Parameters
    ----------
    block
        What is differentiated.
    x
        Its input.
    shortcut
        What its shortcut starts from where that is not ``x``.
    parameters, moments, kept
        Of every unit, as forward left them.
    wanted, wants_input
        Of every unit: which parameters' gradients are wanted, and whether anything in front of it wants one.
    index
        What the pool kept, None where there is none.
    wants_shortcut
        Whether the gradient of a separate shortcut is wanted.
    masks_x
        Whether ``x`` comes out of a ReLU whose mask the gradient of ``x`` is to have.
    memory
        See :class:`fused_resnet.chain.spec.Options`.
    k
        The kernels, see :func:`fused_resnet.ops.kernels`.

    Attributes
    ----------
    gradients
        Those of every unit's parameters, None where they are not wanted.
    """

    def __init__(
        self,
        block: Block,
        x: Tensor,
        shortcut: Tensor | None,
        parameters: Sequence[Parameters],
        moments: Sequence[Tensor],
        kept: Sequence[Saved],
        wanted: Sequence[Parameters],
        wants_input: Sequence[bool],
        *,
        index: Any,
        wants_shortcut: bool,
        masks_x: bool,
        memory: str,
        k: SimpleNamespace,
    ):
        self.block, self.memory, self.k, self.x = block, memory, k, x
        self.source = x if shortcut is None else shortcut
        self.separate = shortcut is not None
        self.parameters, self.moments, self.kept, self.index = parameters, moments, kept, index
        self.wanted, self.wants_input = wanted, wants_input
        self.wants_x, self.wants_shortcut = wants_input[0], wants_shortcut
        self.masks_x = masks_x and self.wants_x
        self.gradients = [Parameters(None, None, None, None)] * len(parameters)

    def run(self, gradient: Gradient, output: Tensor | None) -> tuple[Gradient | None, Tensor | None]:
        """Return the gradients of ``x`` and of a separate shortcut; ``output`` where the block masks by it."""
        last = len(self.block.units) - 1
        if self.block.remakes_sum:
            output = self.sum_at_end()
        if self.block.pool is not None:
            size = self.y(last).shape[2:]
            grad = dense_like(gradient.grad, self.index)
            gradient = Gradient(self.k.max_pool_backward(grad, self.index, size, *map(list, self.block.pool)), None)
        behind, d_source = self.end(gradient, output)
        for i in range(last - 1, 0, -1):
            behind = self.conv(i, self.norm(i, behind))
        dx = self.first(behind, d_source, gradient.grad, output)
        return dx if self.wants_x else None, d_source if self.separate and self.wants_shortcut else None

    def end(self, gradient: Gradient, z: Tensor | None) -> tuple[Behind, Tensor | None]:
        """Take the gradient through the last unit and the shortcut.

        Returns what the last unit hands on and, where the shortcut is more than the block's own input, its gradient.
        """
        last, shortcut = len(self.block.units) - 1, self.block.shortcut
        units = range(last, len(self.block.all_units))
        stored = [i for i in units if not self.kept[i].lacks_y]
        if z is not None and gradient.sum is None and len(stored) < len(units):  # written once, read by both
            grad = dense_like(gradient.grad, z)
            masked = (grad, self.k.masked_grad_(grad, None, z)) if gradient.owned else self.k.masked_grad(grad, z)
            gradient = Gradient(*masked)
        wants_source = self.wants_shortcut if self.separate else self.wants_x
        if gradient.sum is not None:
            dy = self.branches(stored, gradient.grad, None, NONE) if stored else ()
            d_source = self.of_shortcut(gradient.grad) if wants_source else None
        else:
            wants_masked = wants_source and self.takes_masked()
            owns_grad = gradient.owned and shortcut is None
            dy = self.branches(stored, gradient.grad, z, self.block.units[last].act, wants_masked, owns_grad)
            d_source = dy[1] if wants_masked else None
        of_stored = dict(zip(stored, dy, strict=False))
        behind, *projection = [
            self.conv(i, of_stored[i]) if i in of_stored else self.pointwise_conv_norm(i, gradient) for i in units
        ]
        if isinstance(shortcut, Unit):
            d_source = projection[0].dz
        return behind, None if d_source is None else self.of_source(d_source)

    def first(self, behind: Behind, d_source: Tensor | None, grad: Tensor, z: Tensor | None) -> Gradient | None:
        """Take the gradient through the first unit and add the shortcut's, ``grad`` behind the ReLU's mask by ``z``.

        A product of matrices is added to the shortcut's gradient itself, which reads and writes one tensor once.  As
        wide as a block's input is, that is a third of what a convolution and an addition behind it move.
        """
        dx = behind.dz
        if len(self.block.units) > 1:
            dy = self.norm(0, behind)
            if dy is not None and d_source is not None and self.wants_x and self.adds_product(dy, d_source):
                return self.add_product(dy, d_source)
            dx = self.conv(0, dy).dz
        if dx is None:
            return None
        if self.separate:
            return Gradient(dx, None)
        if d_source is None and self.block.shortcut == IDENTITY:
            z = None if z is None else dense_like(z, dx)
            self.k.add_masked_(dx, dense_like(grad, dx), z)
        elif d_source is not None and self.masks_x and d_source.shape == dx.shape:
            return Gradient(dx, self.k.masked_grad_(dx, dense_like(d_source, dx), dense_like(self.x, dx)))
        elif d_source is not None:
            (dx if d_source.shape == dx.shape else self.block.pixels(dx)).add_(d_source)
        return Gradient(dx, None)

    def add_product(self, dy: Tensor, d_source: Tensor) -> Gradient:
        """Keep the first convolution's weight gradient, and add its input gradient to ``d_source`` in place."""
        weight, parameter = self.weight(0), self.parameters[0].conv_weight
        masks = self.masks_x and makes_sums(self.block.units[0], weight, self.k.engine, self.memory)
        wants_weight = masks and bool(self.wanted[0].conv_weight) and makes_weight_gradient(weight.shape[0])
        if not wants_weight:
            self.conv(0, dy, wants_input=False)
        if not masks:
            rows(d_source).addmm_(rows(dy), weight.flatten(1))
            return Gradient(d_source, None)  # to mask it is a pass, here or in the block in front
        x = dense_like(self.x, d_source)
        sums, d_weight = self.k.pointwise_conv_add_grad_(d_source, dy, weight, x, wants_weight)
        if wants_weight:
            self.gradients[0] = self.gradients[0]._replace(conv_weight=_as(d_weight, parameter))
        return Gradient(d_source, sums)

    def takes_masked(self) -> bool:
        """Whether the gradient behind the last ReLU's mask is of use to the shortcut."""
        if self.separate or self.block.shortcut != IDENTITY:
            return self.block.shortcut == IDENTITY or isinstance(self.block.shortcut, Padded)
        first, last = self.y(0), self.y(len(self.block.units) - 1)
        adds_product = len(self.block.units) > 1 and self.adds_product(first, last)
        return self.block.remakes_sum or (self.block.masks_by_output and (self.masks_x or adds_product))

    def adds_product(self, dy: Tensor, d_source: Tensor) -> bool:
        """Whether the first convolution is a product of matrices that can be added to the shortcut's gradient."""
        unit = self.block.units[0]
        if self.separate or unit.conv is None or unit.conv.stride != (1, 1) or d_source.shape != self.x.shape:
            return False
        return is_pointwise(unit, self.weight(0)) and is_channels_last(dy) and is_channels_last(d_source)

    def of_shortcut(self, masked: Tensor) -> Tensor | None:
        """Return the part of a masked gradient that belongs to a shortcut without a convolution."""
        if isinstance(self.block.shortcut, Padded):
            return masked[:, self.block.shortcut.before : masked.shape[1] - self.block.shortcut.after]
        return masked if self.block.shortcut == IDENTITY else None

    def of_source(self, d_pixels: Tensor) -> Tensor:
        """Return the gradient of a shortcut's source from that of its pixels, which may have been broadcast.

        Where the source is ``x``, :meth:`first` puts them in their places.
        """
        if d_pixels.shape == self.source.shape:
            return d_pixels
        d_pixels = d_pixels.sum_to_size(self.block.pixels(self.source).shape)
        if not self.separate or d_pixels.shape == self.source.shape:
            return d_pixels
        d_source = torch.zeros_like(self.source)
        self.block.pixels(d_source).copy_(d_pixels)
        return d_source

    def norm(self, i: int, behind: Behind) -> Tensor | None:
        """Return ``dy`` of a unit inside the block, and make the weight gradient that waits for its activation."""
        if behind.dz is None:
            return None
        wants_z = behind.dy is not None
        dy, z = self.branches(
            [i], behind.dz, None, self.block.units[i].act, owns_grad=True, sums=behind.sums, wants_activation=wants_z
        )
        if behind.dy is not None:
            self.convolution(i + 1, behind.dy, self.z(i + 1) if z is None else z, wants_input=False)
        return dy

    def branches(
        self,
        units: Sequence[int],
        grad: Tensor,
        z: Tensor | None,
        act: Act,
        wants_masked: bool = False,
        owns_grad: bool = False,
        sums: Tensor | None = None,
        wants_activation: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Take one activation's gradient through its batch norm, or through the two that end in one add.

        Returns ``dy``, and the second branch's ``dy`` or, where ``wants_masked``, ``G``.  A gradient that nobody else
        holds (``owns_grad``) gives its memory to ``dy``; then the second is the activation where that is wanted.
        """
        first = units[0]
        y, affine = self.y(first), self.kept[first].affine
        side = dense_like(self.y(units[1]), y) if len(units) == 2 else None
        grad = dense_like(grad, y)
        if sums is None and self.needs_sums(units):
            side_moments = None if side is None else self.moments[units[1]]
            sums = self.k.batch_norm_act_reduce(grad, y, self.moments[first], affine, z, side, side_moments, *act)
        count = y.numel() // y.shape[1]
        coefficients = [self.coefficients(i, branch, sums, count) for branch, i in enumerate(units)]
        if not any(map(self.wants_dy, units)) and not wants_masked:
            return None, None
        if owns_grad:
            activation = self.k.batch_norm_act_backward_(grad, y, affine, coefficients[0], z, *act, wants_activation)
            return grad, activation if wants_activation else None
        side_coefficients = coefficients[1] if side is not None else None
        _, before, after = self.block.padded
        masked_channels = y.shape[1] - before - after if wants_masked else 0
        dy, second = self.k.batch_norm_act_backward(
            grad, y, affine, coefficients[0], z, side, side_coefficients, *act, masked_channels, before
        )
        return dy, second if side is not None or wants_masked else None

    def needs_sums(self, units: Sequence[int]) -> bool:
        """Whether these units' gradients are made of sums over the pixels."""
        wants_parameters = any(self.wanted[i].weight or self.wanted[i].bias for i in units)
        batch_stats = any(self.block.all_units[i].batch_stats for i in units)
        return wants_parameters or (batch_stats and any(map(self.wants_dy, units)))

    def coefficients(self, i: int, branch: int, sums: Tensor | None, count: int) -> Tensor:
        """Keep a unit's ``dγ`` and ``dβ`` and return the coefficients of its ``dy``."""
        unit, parameters, wanted, moments = self.block.all_units[i], self.parameters[i], self.wanted[i], self.moments[i]
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

    def pointwise_conv_norm(self, i: int, gradient: Gradient) -> Behind:
        """Take a masked gradient through a unit whose ``y`` was not kept.

        Where the convolution has a stride, ``dz`` is of the pixels that it read.
        """
        unit, p, wanted = self.block.all_units[i], self.parameters[i], self.wanted[i]
        in_path = i < len(self.block.units)
        gradients = Parameters(None, None, None, _as(gradient.sum, p.bias) if wanted.bias else None)
        dz = sums = None
        if self.wants_dy(i) or wanted.weight:
            x, affine, act = self.raw(i)
            x = dense(x if in_path else self.block.pixels(x), self.k.channels_last)
            x_moments = self.moments[i - 1] if in_path and i > 0 and self.needs_sums([i - 1]) else None
            dz, d_weight, grad_weight, sums = self.k.pointwise_conv_norm_backward(
                gradient.grad, gradient.sum, x, affine, x_moments, act, self.weight(i), self.moments[i],
                self.kept[i].y, p.weight, unit.eps, self.wants_input[i],
            )  # fmt: skip
            gradients = gradients._replace(
                conv_weight=_as(d_weight, p.conv_weight) if wanted.conv_weight else None,
                weight=_as(grad_weight, p.weight) if wanted.weight else None,
            )
            if x_moments is None:
                sums = None
        self.gradients[i] = gradients
        return Behind(dz, sums, None) if self.wants_input[i] else Behind(None, None, None)

    def conv(self, i: int, dy: Tensor | None, wants_input: bool = True) -> Behind:
        """Take the gradient through a unit's convolution; its weight's may wait for the norm in front."""
        if dy is None or not self.wants_dy(i):
            return Behind(None, None, None)
        if self.block.all_units[i].conv is None:
            return Behind(dy, None, None)
        wants_input, wanted, (x, affine, _) = wants_input and self.wants_input[i], self.wanted[i], self.raw(i)
        if affine is not None and wanted.conv_weight and wants_input:
            return Behind(self.convolution(i, dy, x, wants_weights=False), None, dy)
        z = self.z(i) if wanted.conv_weight else x  # of which only the shape is read
        return Behind(self.convolution(i, dy, z, wants_input), None, None)

    def convolution(
        self, i: int, dy: Tensor, z: Tensor, wants_input: bool = True, wants_weights: bool = True
    ) -> Tensor | None:
        """Keep the gradients of a unit's convolution and return its ``dz``, those that are wanted."""
        conv, p, weight = self.block.all_units[i].conv, self.parameters[i], self.weight(i)
        assert conv is not None
        wants_conv_weight = wants_weights and bool(self.wanted[i].conv_weight)
        wants_conv_bias = wants_weights and bool(self.wanted[i].conv_bias)
        if not (wants_input or wants_conv_weight or wants_conv_bias):
            return None
        dz: Tensor | None
        dz, dw, db = _convolution_backward(
            dy, z, weight, [weight.shape[0]] if conv.bias else None, conv.stride, conv.padding, conv.dilation, False,
            (0,) * len(conv.stride), conv.groups, [wants_input, wants_conv_weight, wants_conv_bias],
        )  # fmt: skip
        if wants_weights:
            self.gradients[i] = self.gradients[i]._replace(
                conv_weight=_as(dw, p.conv_weight) if wants_conv_weight else None,
                conv_bias=_as(db, p.conv_bias) if wants_conv_bias else None,
            )
        return dz if wants_input else None

    def weight(self, i: int) -> Tensor:
        """Return the weight of a unit's convolution in the dtype of the activations."""
        cast = self.kept[i].conv_weight
        weight: Tensor = self.parameters[i].conv_weight if cast is None else cast
        return weight

    def raw(self, i: int) -> Raw:
        """Return what the input of a unit's convolution is made of."""
        if i in (0, len(self.block.units)):
            return self.x if i == 0 else self.source, None, NONE
        return self.y(i - 1), self.kept[i - 1].affine, self.block.units[i - 1].act

    def z(self, i: int) -> Tensor:
        """Return the input of a unit's convolution, rebuilt where it was not kept."""
        y, affine, act = self.raw(i)
        if affine is None:
            return y
        z: Tensor = self.k.batch_norm_act(y, affine, None, None, *act)
        return z

    def y(self, i: int) -> Tensor:
        """Return the input of a unit's batch norm."""
        y = self.kept[i].y
        return y if y is not None else dense(self.x if i < len(self.block.units) else self.source, self.k.channels_last)

    def sum_at_end(self) -> Tensor:
        """Return what the block's last activation read, ``a·y + b + R``, made again."""
        last = len(self.block.units) - 1
        y, residual, residual_affine = self.y(last), self.block.pixels(self.source), None
        if isinstance(self.block.shortcut, Unit):
            residual, residual_affine = self.y(last + 1), self.kept[last + 1].affine
        _, before, after = self.block.padded
        residual = residual_like(residual, y, before + after)
        z: Tensor = self.k.batch_norm_act(y, self.kept[last].affine, residual, residual_affine, *NONE, before)
        return z

    def wants_dy(self, i: int) -> bool:
        """Whether the gradient of a unit's batch norm's input leads anywhere."""
        return self.wants_input[i] or bool(self.wanted[i].conv_weight or self.wanted[i].conv_bias)


def _as(gradient: Any, parameter: Any) -> Tensor:
    """``gradient`` in the dtype of ``parameter``, and in its strides where they are the same memory's.

    The stride of a side of one element means nothing, but DistributedDataParallel compares it.
    """
    result: Tensor = gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
    theirs, strides = result.stride(), parameter.stride()
    if theirs != strides and all(a == b or n == 1 for a, b, n in zip(theirs, strides, parameter.shape, strict=True)):
        result = result.as_strided(parameter.shape, strides)
    return result
