"""The operations of this folder made of torch's products and an engine's batch norm kernels."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.library import dense, rows

_convolution_backward = torch.ops.aten.convolution_backward.default


def operations(k: Any) -> SimpleNamespace:
    """Return the operations over ``k``, the batch norm kernels of an engine."""

    def pointwise_conv_stats(
        x: Tensor, conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = dense(torch.conv2d(x, conv_weight), k.channels_last)
        return y, *k.batch_norm_stats(y, weight, bias, eps)

    def pointwise_conv_add_grad_(
        d_source: Tensor, dy: Tensor, conv_weight: Tensor, x: Tensor, wants_weight: bool
    ) -> tuple[Tensor, Tensor]:
        rows(d_source).addmm_(rows(dy), conv_weight.flatten(1))
        sums: Tensor = k.masked_grad_(d_source, None, x)
        if not wants_weight:
            return sums, sums.new_empty(0)
        _, d_conv_weight, _ = _convolution_backward(
            dy, x, conv_weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, [False, True, False]
        )
        return sums, d_conv_weight.to(sums.dtype)

    return SimpleNamespace(pointwise_conv_stats=pointwise_conv_stats, pointwise_conv_add_grad_=pointwise_conv_add_grad_)
