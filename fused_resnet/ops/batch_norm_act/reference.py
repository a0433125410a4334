"""Batch norm, optional second branch and ReLU, in plain torch: the definition that every engine is tested against.

Shapes: activations are ``[N, C, H, W]`` in float32, bfloat16, float16 or float64, dense in either memory format.
Per-channel tensors are float32 (float64 for float64 activations), contiguous, and stacked into one tensor each:

=================  ======  ============================================================
name               shape   rows
=================  ======  ============================================================
``moments``        [3, C]  mean, biased variance, unbiased variance (for the running one)
``affine``         [2, C]  scale ``a``, shift ``b``; the normalised output is ``a·x + b``
``sums``           [2, C]  ΣG, ΣG·(x − mean); four rows where there are two branches
``coefficients``   [4, C]  a, g0, k, mean; the input's gradient is ``a·((G − g0) − k·(x − mean))``; [1, C], ``a`` alone,
                           where the statistics are not the batch's own
=================  ======  ============================================================

Everything per element is computed in the accumulation dtype and rounded once; everything per channel in float64.
"""

import torch
from torch import Tensor

from fused_resnet.ops.activation import NONE, Act, gradient, value
from fused_resnet.ops.library import accumulation_dtype


def batch_norm_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Compute ``mean = Σx/m``, ``var = Σ(x − mean)²/m`` of every channel, ``m = N·H·W``.

    Returns (moments [3, C], affine [2, C] of :func:`batch_norm_affine`).
    """
    var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), dim=(0, 2, 3), correction=0)
    count = x.numel() // x.shape[1]
    moments = torch.stack((mean, var, var * (count / max(count - 1, 1))))
    return moments, batch_norm_affine(moments, weight, bias, eps)


def batch_norm_merge(parts: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Merge the statistics of R parts of a batch, [R, 2C + 1]: each one's ``mean``, ``M2 = Σ(x − mean)²`` and count m.

    ``mean = Σ m_i·mean_i / m``, ``var = (Σ M2_i + Σ m_i·(mean_i − mean)²) / m``; a part may be empty.  Chan et al.,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979.  Returns (moments [3, C], affine
    [2, C] of :func:`batch_norm_affine`).
    """
    channels = parts.shape[1] // 2
    means, m2, counts = parts.double().split((channels, channels, 1), dim=1)
    count = counts.sum().clamp_min(1)
    mean = (counts * means).sum(0) / count
    var = (m2 + counts * (means - mean).square()).sum(0) / count
    moments = torch.stack((mean, var, var * (count / (count - 1).clamp_min(1)))).to(parts.dtype)
    return moments, batch_norm_affine(moments, weight, bias, eps)


def batch_norm_affine(moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute ``a = γ/√(var + eps)``, ``b = β − mean·a``; returns affine [2, C].

    ``b`` is made from the rounded ``a``, so that the two errors cancel where ``|mean| ≫ std``.
    """
    mean, var, _ = moments.double()
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean * scale.to(moments.dtype).double()
    if bias is not None:
        shift = shift + bias.double()
    return torch.stack((scale, shift)).to(moments.dtype)


def batch_norm_act(
    x: Tensor,
    affine: Tensor,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    act: int,
    alpha: float,
    beta: float,
    residual_channel: int = 0,
) -> Tensor:
    """Compute ``z = act(a·x + b + R)``.

    ``R`` is 0, the residual, or ``a_r·residual + b_r`` where ``residual_affine`` is given.  A residual without affine
    may have fewer channels than ``x``: its first is added to channel ``residual_channel``, and ``R`` of the channels
    that it does not reach is 0.
    """
    z = _scale_shift(x, affine)
    if residual is not None:
        part = z[:, residual_channel : residual_channel + residual.shape[1]]
        part += residual if residual_affine is None else _scale_shift(residual, residual_affine)
    return value(Act(act, alpha, beta), z).to(x.dtype)


def batch_norm_act_(
    x: Tensor,
    affine: Tensor,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    act: int,
    alpha: float,
    beta: float,
) -> None:
    """Compute the ``z`` of :func:`batch_norm_act` into ``x``, which is lost."""
    x.copy_(batch_norm_act(x, affine, residual, residual_affine, act, alpha, beta))


def batch_norm_act_reduce(
    grad: Tensor,
    x: Tensor,
    moments: Tensor,
    affine: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    residual_moments: Tensor | None,
    act: int,
    alpha: float,
    beta: float,
) -> Tensor:
    """Compute ``ΣG`` and ``ΣG·(x − mean)`` of every channel; returns sums [2, C] or [4, C].

    ``G = grad·act'(v)``, ``v = z``, or ``a·x + b`` without ``z``.  Of a block's end ``z`` is what its activation was
    made of; for a ReLU also what it has made, whose sign is the same.  With ``residual`` two further rows hold the
    second branch's sums.
    """
    masked = _masked(grad, x, affine, z, Act(act, alpha, beta))
    rows = _sums(masked, x, moments)
    if residual is not None and residual_moments is not None:
        rows += _sums(masked, residual, residual_moments)
    return torch.stack(rows)


def batch_norm_coefficients(
    sums: Tensor, branch: int, moments: Tensor, weight: Tensor | None, eps: float, count: int, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Finalise the sums of one branch, 0 or 1; returns (dγ [C], dβ [C], coefficients [4, C] or [1, C]).

    ``dβ = ΣG``, ``dγ = rstd·ΣG·(x − mean)``, ``g0 = dβ/m``, ``k = rstd·dγ/m``, with ``m = count``.
    Where the statistics are not the batch's own (``batch_stats`` false) there is only ``a``.
    """
    mean, var, _ = moments.double()
    sum_grad, sum_centred = sums[2 * branch : 2 * branch + 2].double()
    rstd = (var + eps).rsqrt()
    scale = rstd if weight is None else rstd * weight.double()
    grad_weight = rstd * sum_centred
    rows = (scale, sum_grad / count, rstd * grad_weight / count, mean) if batch_stats else (scale,)
    coefficients = torch.stack(rows).to(moments.dtype)
    return grad_weight.to(moments.dtype), sum_grad.to(moments.dtype, copy=True), coefficients


def batch_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    affine: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    residual_coefficients: Tensor | None,
    act: int,
    alpha: float,
    beta: float,
    masked_channels: int,
    masked_channel: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute ``dx = a·((G − g0) − k·(x − mean))``; returns (dx, second).

    ``G`` is that of :func:`batch_norm_act_reduce`.  ``second`` is the same of the residual where there is a second
    branch, else ``G`` of ``masked_channels`` channels, dense, the first of which is ``masked_channel``; empty where
    they are none.
    """
    masked = _masked(grad, x, affine, z, Act(act, alpha, beta))
    if residual is not None and residual_coefficients is not None:
        second = _input_gradient(masked, residual, residual_coefficients).to(residual.dtype)
    else:
        written = masked[:, masked_channel : masked_channel + masked_channels]
        second = written.to(grad.dtype, copy=True) if masked_channels else grad.new_empty(0)
    return _input_gradient(masked, x, coefficients).to(x.dtype), second


def batch_norm_act_backward_(
    grad: Tensor,
    x: Tensor,
    affine: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    act: int,
    alpha: float,
    beta: float,
    wants_activation: bool,
) -> Tensor:
    """Compute the ``dx`` of :func:`batch_norm_act_backward` of one branch into ``grad``, which is lost.

    Returns ``act(a·x + b)``, which the weight gradient of the next convolution reads, where ``wants_activation``, else
    nothing (empty).  There is no ``z`` to be had where it is wanted, and a ``z`` is refused.
    """
    if wants_activation and z is not None:
        raise ValueError("z must be None where wants_activation is true, got a tensor; call batch_norm_act for it")
    grad.copy_(batch_norm_act_backward(grad, x, affine, coefficients, z, None, None, act, alpha, beta, 0)[0])
    return batch_norm_act(x, affine, None, None, act, alpha, beta) if wants_activation else x.new_empty(0)


def masked_grad(grad: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``G``, which is ``grad`` or 0 where ``z <= 0``, and ``ΣG`` of every channel; returns (G, sums [C])."""
    masked = torch.where(z <= 0, 0, grad)
    return masked, masked.sum((0, 2, 3), dtype=accumulation_dtype(grad.dtype))


def masked_grad_(grad: Tensor, other: Tensor | None, z: Tensor) -> Tensor:
    """Compute the ``G`` of :func:`masked_grad` of ``grad``, or of ``grad + other``, into ``grad``, which is lost.

    Returns ``ΣG`` [C] of what is stored: a sum is rounded once, before it is masked and added up.
    """
    masked, sums = masked_grad(grad if other is None else grad + other, z)
    grad.copy_(masked)
    return sums


def add_masked_(dx: Tensor, grad: Tensor, z: Tensor | None) -> None:
    """Add ``grad`` to ``dx`` in place, or its ``G`` of :func:`masked_grad`: what an identity shortcut brings back."""
    dx.add_(grad if z is None else torch.where(z <= 0, 0, grad))


def update_running_stats_(
    means: list[Tensor],
    variances: list[Tensor],
    counters: list[Tensor],
    moments: list[Tensor],
    momentum: float | None,
) -> None:
    """Count a batch, and move running means and (unbiased) variances: ``running += momentum·(batch − running)``.

    Without ``momentum`` they become the average of all batches that their counters have seen.
    """
    if counters:
        torch._foreach_add_(counters, 1)
    running = [*means, *variances]
    batch = [*(mean for mean, _, _ in moments), *(var for _, _, var in moments)]
    if momentum is None:
        for moved, new, counter in zip(running, batch, counters * 2, strict=True):
            moved.copy_(moved.double().lerp(new.double(), counter.double().reciprocal()))
    else:
        torch._foreach_lerp_(running, [new.to(r.dtype) for new, r in zip(batch, running, strict=True)], momentum)


def _channels(row: Tensor) -> Tensor:
    return row.view(1, -1, 1, 1)


def _scale_shift(x: Tensor, affine: Tensor) -> Tensor:
    return torch.addcmul(_channels(affine[1]), x.to(affine.dtype), _channels(affine[0]))


def _masked(grad: Tensor, x: Tensor, affine: Tensor, z: Tensor | None, act: Act) -> Tensor:
    grad = grad.to(affine.dtype)
    return grad if act == NONE else gradient(act, grad, _scale_shift(x, affine) if z is None else z)


def _sums(grad: Tensor, x: Tensor, moments: Tensor) -> list[Tensor]:
    centred = x.to(moments.dtype) - _channels(moments[0])
    return [grad.sum((0, 2, 3)), (grad * centred).sum((0, 2, 3))]


def _input_gradient(grad: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
    if coefficients.shape[0] == 1:
        return _channels(coefficients[0]) * grad
    a, g0, k, mean = map(_channels, coefficients)
    return a * ((grad - g0) - k * (x.to(coefficients.dtype) - mean))
