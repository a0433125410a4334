"""The operations of this folder made of torch's convolutions and an engine's batch norm kernels.

Everything that is as large as an activation is a convolution or one of those kernels, so that either memory format and
every dtype is served.  ``y`` lives only until it becomes ``z``, in place.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.activation import NONE, Act
from fused_resnet.ops.library import accumulation_dtype, dense, dense_like
from fused_resnet.ops.pointwise_conv_norm.reference import finish

# of a gradient in half precision: 4 MB of float32
WIDENED_ELEMENTS = 1 << 20

_convolution_backward = torch.ops.aten.convolution_backward.default


def operations(k: Any) -> SimpleNamespace:
    """Return the operations over ``k``, the batch norm kernels of an engine."""

    def pointwise_conv_norm_act(
        x: Tensor,
        x_affine: Tensor | None,
        x_act: Act,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        residual_affine: Tensor | None,
        act: Act,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u = x if x_affine is None else k.batch_norm_act(x, x_affine, None, None, *x_act)
        y = dense(torch.conv2d(u, conv_weight), k.channels_last)
        del u
        residual = None if residual is None else dense_like(residual, y)
        moments, affine = k.batch_norm_stats(y, weight, bias, eps)
        k.batch_norm_act_(y, affine, residual, residual_affine, *act)
        # of an engine that has kernels of its own, these are the fakes
        elements = x.shape[1] * (x.shape[1] + 1) if k.engine == "triton" else 0
        return y, moments, affine, moments.new_empty(elements)

    def pointwise_conv_norm_backward(
        grad: Tensor,
        sum_grad: Tensor,
        x: Tensor,
        x_affine: Tensor | None,
        x_moments: Tensor | None,
        x_act: Act,
        conv_weight: Tensor,
        moments: Tensor,
        gram: Tensor,
        weight: Tensor | None,
        eps: float,
        wants_input: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(x.dtype)
        u = x if x_affine is None else k.batch_norm_act(x, x_affine, None, None, *x_act)
        mean = k.batch_norm_stats(u, None, None, 0.0)[0][0]
        if u.dtype == dtype:
            u = k.batch_norm_act(u, torch.stack((torch.ones_like(mean), -mean)), None, None, *NONE)
        else:
            u = u.to(dtype).sub_(mean.view(-1, 1, 1))
        inputs = u.shape[1]
        d_conv_weight, grad_weight, folded, mixing, offset = finish(
            _weight_sums(grad, u),
            _weight_gradient(u, u),
            sum_grad,
            conv_weight,
            moments,
            weight,
            eps,
            u.numel() // inputs,
        )
        if not wants_input:
            return grad.new_empty(0), d_conv_weight, grad_weight, moments.new_empty(0)
        du = _input_gradient(grad, u, folded.to(grad.dtype))
        du += torch.conv2d(u, -mixing.T.reshape(inputs, inputs, 1, 1), offset)
        if x_moments is None:
            return du, d_conv_weight, grad_weight, moments.new_empty(0)
        du = dense_like(du, x)
        sums = k.batch_norm_act_reduce(du, x, x_moments, x_affine, None, None, None, *x_act)
        return du, d_conv_weight, grad_weight, sums

    return SimpleNamespace(
        pointwise_conv_norm_act=pointwise_conv_norm_act, pointwise_conv_norm_backward=pointwise_conv_norm_backward
    )


def _weight_sums(grad: Tensor, u: Tensor) -> Tensor:
    """Return ``gradᵀ·u`` in the dtype of ``u``.

    The products of a half precision are not summed in it: dγ is a sum over them.  A few images at a time are widened,
    so that they are read again from the caches.
    """
    if grad.dtype == u.dtype:
        return _weight_gradient(grad, u)
    images = max(1, WIDENED_ELEMENTS // grad[0].numel())
    chunks = zip(grad.split(images), u.split(images), strict=True)
    sums = [_weight_gradient(few.to(u.dtype), their_u) for few, their_u in chunks]
    return torch.stack(sums).sum(0)


def _input_gradient(grad: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """Return ``grad·weight`` at every pixel, in the shape of ``u``: the input gradient of a 1×1 convolution."""
    gradient: Tensor = _gradients(grad, u.to(grad.dtype), weight, [True, False, False])[0]
    return gradient


def _weight_gradient(grad: Tensor, u: Tensor) -> Tensor:
    """Return ``gradᵀ·u`` over all pixels, [N, K]: the weight gradient of a 1×1 convolution."""
    weight = grad.new_empty(grad.shape[1], u.shape[1])
    gradient: Tensor = _gradients(grad, u, weight, [False, True, False])[1]
    return gradient.flatten(1)


def _gradients(grad: Tensor, u: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight[:, :, None, None]
    return _convolution_backward(  # type: ignore[no-any-return]
        grad, u, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, wanted
    )
