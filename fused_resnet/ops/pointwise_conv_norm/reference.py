"""A 1×1 convolution and its batch norm whose output ``y`` is never kept, in plain torch: the definition.

``u`` is the convolution's input: ``x`` itself, or ``act(a·x + b)`` where ``x`` is the raw output of the convolution
before and ``x_affine`` its scale and shift; that ``act`` is a ReLU, or none.  ``y = u·Wᵀ`` at every pixel, with K
inputs and N outputs.  Batch norm's backward is linear in ``y``, hence in ``u``, so that N channels need not be kept
where K do (``c`` is any vector; the mean of ``u`` keeps the most digits, and then ``Σ(u − c)`` is 0):

=====================================  =================================================================
``R = Gᵀ(u − c)``, [N, K]              a weight gradient of the masked gradient ``G``
``S = (u − c)ᵀ(u − c)``, [K, K]        the Gram matrix
``dγ = rstd·⟨R, W⟩`` row by row         since ``y − mean = (u − c)·Wᵀ``
``dW = a·(R − k·W·S)``                 ``k = rstd·dγ/m``, ``m`` pixels
``du = G·Wa − (u − c)·M − g0·Wa``      ``Wa = a·W``, ``M = (k·W)ᵀ·Wa`` [K, K], ``g0 = ΣG/m``
=====================================  =================================================================

Shapes are those of :mod:`fused_resnet.ops.batch_norm_act.reference`; ``W`` is [N, K, 1, 1] in the activations' dtype.
"""

import torch
from torch import Tensor

from fused_resnet.ops.activation import Act
from fused_resnet.ops.batch_norm_act import reference as batch_norm
from fused_resnet.ops.library import accumulation_dtype, rows


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
    """Compute ``z = act(a·(u·Wᵀ) + b + R)``; returns (z [.., N, H, W], moments [3, N], affine [2, N], gram).

    What is in gram, one vector, is an engine's own: sums that its backward need not make again, or nothing, as here.
    ``a``, ``b`` and the moments are those of :func:`fused_resnet.ops.batch_norm_act.reference.batch_norm_stats`, and
    ``R`` is that of ``batch_norm_act``.
    """
    y = torch.conv2d(input_of(x, x_affine, x_act), conv_weight)
    moments, affine = batch_norm.batch_norm_stats(y, weight, bias, eps)
    z = batch_norm.batch_norm_act(y, affine, residual, residual_affine, *act)
    return z, moments, affine, moments.new_empty(0)


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
    """Compute the formulas above from ``G`` (``grad``) and ``ΣG``.

    ``gram`` is what forward returned, or empty where ``y`` was computed by another operation.
    Where ``x`` is the raw output of a unit whose norm wants its sums, ``x_moments`` [3, K] are that norm's.

    Returns (du like ``u``, or empty where not ``wants_input``; dW [N, K, 1, 1] and dγ [N] in the accumulation dtype;
    sums [2, K] that :func:`fused_resnet.ops.batch_norm_act.reference.batch_norm_act_reduce` makes of ``du`` for the
    norm of ``x``, or empty where there is no ``du`` or no ``x_moments``).
    """
    dtype = accumulation_dtype(grad.dtype)
    u = input_of(x, x_affine, x_act).to(dtype)
    centred = rows(u - u.mean((0, 2, 3), keepdim=True))
    masked = rows(grad.to(dtype))
    d_conv_weight, grad_weight, folded, mixing, offset = finish(
        masked.T @ centred, centred.T @ centred, sum_grad, conv_weight, moments, weight, eps, len(centred)
    )
    if not wants_input:
        return grad.new_empty(0), d_conv_weight, grad_weight, moments.new_empty(0)
    du = masked @ folded - centred @ mixing + offset
    du = du.view(*u.movedim(1, 3).shape).movedim(3, 1).to(grad.dtype)
    if x_affine is None or x_moments is None:
        return du, d_conv_weight, grad_weight, moments.new_empty(0)
    sums = batch_norm.batch_norm_act_reduce(du, x, x_moments, x_affine, None, None, None, *x_act)
    return du, d_conv_weight, grad_weight, sums


def input_of(x: Tensor, x_affine: Tensor | None, x_act: Act) -> Tensor:
    """Return ``u``, the input of the convolution."""
    return x if x_affine is None else batch_norm.batch_norm_act(x, x_affine, None, None, *x_act)


def finish(
    weight_sums: Tensor,
    gram: Tensor,
    sum_grad: Tensor,
    conv_weight: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    eps: float,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Finish the sums ``R`` and ``S``, for every engine.

    Returns (dW [N, K, 1, 1], dγ [N], Wa [N, K], M [K, K], −g0·Wa [K]).  ``Wa`` is rounded to the dtype of the
    activations before ``M`` and ``g0·Wa`` are made of it, so that what cancels in ``du`` does cancel.
    """
    dtype = moments.dtype
    w = conv_weight.flatten(1).to(dtype)
    rstd = (moments[1].double() + eps).rsqrt()
    scale = (rstd if weight is None else rstd * weight.double()).to(dtype)
    grad_weight = rstd * torch.linalg.vecdot(weight_sums.double(), w.double())
    k = (rstd * grad_weight / count).to(dtype)
    kw = k[:, None] * w
    d_conv_weight = scale[:, None] * (weight_sums - kw @ gram)
    folded = (scale[:, None] * w).to(conv_weight.dtype).to(dtype)
    return (
        d_conv_weight[:, :, None, None],
        grad_weight.to(dtype),
        folded,
        kw.T @ folded,
        (-(sum_grad.double() / count) @ folded.double()).to(dtype),  # its error would be that of every pixel
    )
