"""The operations of this folder made of torch's convolutions and an engine's batch norm kernels.

Everything that is as large as an activation is a convolution or one of those kernels, so that either memory format and
every dtype is served.  ``y`` lives only until it becomes ``z``, in place.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.library import accumulation_dtype
from fused_resnet.ops.pointwise_conv_norm.reference import finish

_convolution_backward = torch.ops.aten.convolution_backward.default


def operations(k: Any) -> SimpleNamespace:
    """Return the operations over ``k``, the batch norm kernels of an engine."""

    def pointwise_conv_norm_act(
        x: Tensor,
        x_affine: Tensor | None,
        x_relu: bool,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        residual_affine: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        u = x if x_affine is None else k.batch_norm_act(x, x_affine, None, None, x_relu)
        y = torch.conv2d(u, conv_weight)
        del u
        moments, affine = k.batch_norm_stats(y, weight, bias, eps)
        k.batch_norm_act_(y, affine, residual, residual_affine, relu)
        return y, moments, affine

    def pointwise_conv_norm_backward(
        grad: Tensor,
        sum_grad: Tensor,
        x: Tensor,
        x_affine: Tensor | None,
        x_relu: bool,
        conv_weight: Tensor,
        moments: Tensor,
        weight: Tensor | None,
        eps: float,
        wants_input: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(x.dtype)
        u = x if x_affine is None else k.batch_norm_act(x, x_affine, None, None, x_relu)
        mean = k.batch_norm_stats(u, None, None, 0.0)[0][0]
        u = k.batch_norm_act(u, torch.stack((torch.ones_like(mean), -mean)), None, None, False)
        outputs, inputs = conv_weight.shape[:2]
        d_conv_weight, grad_weight, folded, mixing, offset = finish(
            _weight_gradient(grad, u).to(dtype),
            _weight_gradient(u, u).to(dtype),
            sum_grad,
            conv_weight,
            moments,
            weight,
            eps,
            u.numel() // inputs,
        )
        if not wants_input:
            return grad.new_empty(0), d_conv_weight, grad_weight
        folded, mixing, offset = (t.to(grad.dtype) for t in (folded.T, mixing.T, offset))
        du = torch.conv2d(grad, folded.reshape(inputs, outputs, 1, 1), offset)
        return du.sub_(torch.conv2d(u, mixing.reshape(inputs, inputs, 1, 1))), d_conv_weight, grad_weight

    return SimpleNamespace(
        pointwise_conv_norm_act=pointwise_conv_norm_act, pointwise_conv_norm_backward=pointwise_conv_norm_backward
    )


def _weight_gradient(grad: Tensor, u: Tensor) -> Tensor:
    """Return ``gradᵀ·u`` over all pixels, [N, K]: the weight gradient of a 1×1 convolution."""
    weight = grad.new_empty(grad.shape[1], u.shape[1], 1, 1)
    gradient: Tensor
    _, gradient, _ = _convolution_backward(
        grad, u, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, [False, True, False]
    )
    return gradient.flatten(1)
