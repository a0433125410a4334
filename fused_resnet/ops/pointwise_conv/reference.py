"""A 1×1 convolution whose output is kept, and the sums that the batch norms beside it need: the definition.

Forward, the batch norm *behind* the convolution needs the statistics of its output.  Backward, the convolution is a
block's first: where its input gradient is added to the shortcut's, all of the gradient is there that reaches the end
of the block *before*, whose ReLU masks it and whose batch norm needs its sum.  That ReLU's output is the convolution's
input, so that its weight gradient is made of what is read anyway.

Shapes are those of :mod:`fused_resnet.ops.batch_norm_act.reference`; ``W`` is [N, K, 1, 1] in the activations' dtype,
for K inputs and N outputs.
"""

import torch
from torch import Tensor

from fused_resnet.ops.batch_norm_act import reference as batch_norm
from fused_resnet.ops.library import accumulation_dtype


def pointwise_conv_stats(
    x: Tensor, conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``y = x·Wᵀ`` at every pixel; returns (y [.., N, H, W], moments [3, N], affine [2, N]).

    The moments and the affine are those of :func:`fused_resnet.ops.batch_norm_act.reference.batch_norm_stats` of ``y``
    as it is kept, rounded to its dtype.
    """
    y = torch.conv2d(x, conv_weight)
    return y, *batch_norm.batch_norm_stats(y, weight, bias, eps)


def pointwise_conv_add_grad_(
    d_source: Tensor, dy: Tensor, conv_weight: Tensor, x: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Add ``dy·W`` to the gradient ``d_source`` in place, and set it to 0 where ``x <= 0`` (NaN passes).

    ``x`` is the convolution's input, which is the output of the ReLU in front.

    Returns the sum of every channel of what is then in ``d_source``, [K], and, where wanted, the weight gradient
    ``dW = dyᵀ·x`` [N, K, 1, 1], else nothing [0]; both in the accumulation dtype.
    """
    dtype = accumulation_dtype(d_source.dtype)
    product = torch.einsum("bnhw,nk->bkhw", dy.to(dtype), conv_weight.flatten(1).to(dtype))
    d_source.copy_(torch.where(x <= 0, 0, d_source + product))
    sums = d_source.sum((0, 2, 3), dtype=dtype)
    if not wants_weight:
        return sums, sums.new_empty(0)
    return sums, torch.einsum("bnhw,bkhw->nk", dy.to(dtype), x.to(dtype))[:, :, None, None]
