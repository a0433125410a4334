"""Batch norm, optional second branch and activation on a GPU, backward: the reference's functions as Triton kernels.

Activations, and what they are computed in, are those of ``triton_forward.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act import config
from fused_resnet.ops.batch_norm_act.triton_pieces import in_part, one_pass, part_of_channels
from fused_resnet.ops.launch import ceil_div, multiprocessors
from fused_resnet.ops.triton_activation import NONE, act, act_grad, relu_grad
from fused_resnet.ops.triton_merge import add_parts
from fused_resnet.ops.triton_pieces import scale_shift, split_program

__all__ = [
    "add_masked_",
    "batch_norm_act_backward",
    "batch_norm_act_backward_",
    "batch_norm_act_reduce",
    "batch_norm_coefficients",
    "masked_grad",
    "masked_grad_",
]


# ---- kernels


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _reduce_kernel(
    grad,
    x,
    moments,
    affine,
    z,
    residual,
    residual_moments,
    partial,
    M,
    C,
    parts,
    rows_per_part,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    Z: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``ΣG``, ``ΣG·(x − mean)`` and the second branch's of each part of the rows; partial [2 or 3, parts, C].

    Bytes: 2s an element, and s for each of z and residual.
    """
    part, columns, mask = split_program(tl.program_id(0), C, BLOCK_C)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, M)
    mean = tl.load(moments + columns, mask, 0.0)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    centred = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if RESIDUAL:
        residual_mean = tl.load(residual_moments + columns, mask, 0.0)
        residual_centred = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        at = rows[:, None] * C + columns[None, :]
        inside = (rows < end)[:, None] & mask[None, :]
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        masked = tl.load(grad + at, inside, 0.0).to(tl.float32)  # 0 outside: such a row adds nothing
        if ACT != NONE:
            value = tl.load(z + at, inside, 0.0).to(tl.float32) if Z else scale_shift(values, affine, C, columns, mask)
            masked = act_grad(masked, value, ACT, ALPHA, BETA)
        total += masked
        centred += masked * (values - mean[None, :])
        if RESIDUAL:
            side = tl.load(residual + at, inside, 0.0).to(tl.float32)
            residual_centred += masked * (side - residual_mean[None, :])
    out = partial + part * C + columns
    tl.store(out, tl.sum(total, 0), mask)
    tl.store(out + parts * C, tl.sum(centred, 0), mask)
    if RESIDUAL:
        tl.store(out + 2 * parts * C, tl.sum(residual_centred, 0), mask)


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _masked_grad_kernel(
    grad,
    other,
    z,
    masked_grad,
    partial,
    M,
    C,
    parts,
    rows_per_part,
    OTHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``G`` of grad, or of ``grad + other``, and ``ΣG`` of each part of the rows; partial [1, parts, C].

    Bytes: 3s an element, 4s with other.  ``masked_grad`` may be grad: a step's rows are read by their program alone,
    and a step that is read ahead has others.
    """
    part, columns, mask = split_program(tl.program_id(0), C, BLOCK_C)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, M)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        at = rows[:, None] * C + columns[None, :]
        inside = (rows < end)[:, None] & mask[None, :]
        masked = tl.load(grad + at, inside, 0.0)
        if OTHER:
            # rounded, since what is stored is added up
            masked = (masked.to(tl.float32) + tl.load(other + at, inside, 0.0).to(tl.float32)).to(masked.dtype)
        masked = relu_grad(masked.to(tl.float32), tl.load(z + at, inside, 0.0).to(tl.float32))
        tl.store(masked_grad + at, masked.to(masked_grad.dtype.element_ty), inside)
        total += masked
    tl.store(partial + part * C + columns, tl.sum(total, 0), mask)


@triton.jit(do_not_specialize=["count", "eps"])
def _coefficients_kernel(
    sums,
    moments,
    weight,
    grad_weight,
    grad_bias,
    coefficients,
    C,
    count,
    eps,
    BRANCH: tl.constexpr,
    WEIGHT: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``dβ = ΣG``, ``dγ = rstd·ΣG·(x − mean)``; ``a``, ``g0 = dβ/m``, ``k = rstd·dγ/m``, ``mean``."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    mean = tl.load(moments + columns, mask, 0.0)
    var = tl.load(moments + C + columns, mask, 1.0).to(tl.float64)
    total = tl.load(sums + 2 * BRANCH * C + columns, mask, 0.0)
    centred = tl.load(sums + (2 * BRANCH + 1) * C + columns, mask, 0.0).to(tl.float64)
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if WEIGHT:
        scale *= tl.load(weight + columns, mask, 0.0).to(tl.float64)
    tl.store(grad_weight + columns, (rstd * centred).to(tl.float32), mask)
    tl.store(grad_bias + columns, total, mask)
    tl.store(coefficients + columns, scale.to(tl.float32), mask)
    if BATCH_STATS:
        m = count.to(tl.float64)
        tl.store(coefficients + C + columns, (total.to(tl.float64) / m).to(tl.float32), mask)
        tl.store(coefficients + 2 * C + columns, (rstd * rstd * centred / m).to(tl.float32), mask)
        tl.store(coefficients + 3 * C + columns, mean, mask)


@triton.jit
def _input_gradient(grad, x, coefficients, C, columns, mask, BATCH_STATS: tl.constexpr):
    """``a·((G − g0) − k·(x − mean))``, or ``a·G`` where the statistics were not the batch's own."""
    a = tl.load(coefficients + columns, mask, 0.0)
    if BATCH_STATS:
        g0 = tl.load(coefficients + C + columns, mask, 0.0)
        k = tl.load(coefficients + 2 * C + columns, mask, 0.0)
        mean = tl.load(coefficients + 3 * C + columns, mask, 0.0)
        grad = (grad - g0[None, :]) - k[None, :] * (x - mean[None, :])
    return a[None, :] * grad


@triton.jit(do_not_specialize=["M"])
def _backward_kernel(
    grad,
    x,
    affine,
    coefficients,
    z,
    residual,
    residual_coefficients,
    dx,
    second,
    M,
    C,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    Z: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WRITE_MASKED: tl.constexpr,
    WRITE_ACTIVATION: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    RESIDUAL_BATCH_STATS: tl.constexpr,
    PART_CHANNEL: tl.constexpr,
    PART_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``dx = a·((G − g0) − k·(x − mean))``.

    second: the same of the residual, or ``G`` of all channels or a part, or the activation ``act(a·x + b)``.
    Bytes: 3s an element, s for each of z, masked and the activation, 2s for a residual.
    """
    tile, columns, mask = split_program(tl.program_id(0), C, BLOCK_C)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows[:, None] * C + columns[None, :]
    inside = (rows < M)[:, None] & mask[None, :]
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    masked = tl.load(grad + at, inside, 0.0).to(tl.float32)
    value = scale_shift(values, affine, C, columns, mask)  # the compiler leaves out what nobody asks for
    if ACT != NONE:
        if Z:
            value = tl.load(z + at, inside, 0.0).to(tl.float32)
        masked = act_grad(masked, value, ACT, ALPHA, BETA)
    result = _input_gradient(masked, values, coefficients, C, columns, mask, BATCH_STATS)
    tl.store(dx + at, result.to(dx.dtype.element_ty), inside)
    if RESIDUAL:
        side = tl.load(residual + at, inside, 0.0).to(tl.float32)
        result = _input_gradient(masked, side, residual_coefficients, C, columns, mask, RESIDUAL_BATCH_STATS)
        tl.store(second + at, result.to(second.dtype.element_ty), inside)
    if WRITE_MASKED:
        if PART_CHANNELS:
            at, inside = in_part(rows, columns, inside, PART_CHANNEL, PART_CHANNELS)
        tl.store(second + at, masked.to(second.dtype.element_ty), inside)
    if WRITE_ACTIVATION:
        tl.store(second + at, act(value, ACT, ALPHA, BETA).to(second.dtype.element_ty), inside)


@triton.jit
def _add_masked_kernel(dx, grad, z, numel, Z: tl.constexpr, BLOCK: tl.constexpr):
    """``dx += G``.  Bytes: 3s an element, 4s with z."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    masked = tl.load(grad + at, inside, 0.0).to(tl.float32)
    if Z:
        masked = relu_grad(masked, tl.load(z + at, inside, 0.0).to(tl.float32))
    total = tl.load(dx + at, inside, 0.0).to(tl.float32) + masked
    tl.store(dx + at, total.to(dx.dtype.element_ty), inside)


# ---- the functions of reference.py


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
    """Compute ``ΣG`` and ``ΣG·(x − mean)`` of every channel, and of the second branch; sums [2, C] or [4, C]."""
    channels, two = x.shape[1], residual is not None
    sums = moments.new_empty(4 if two else 2, channels)
    if x.numel() == 0:
        return sums.zero_()
    rows = x.numel() // channels
    cut, parts, rows_per_part = config.reduction(rows, channels, multiprocessors(x.device))
    partial = moments.new_empty(3 if two else 2, parts, channels)
    _reduce_kernel[parts * ceil_div(channels, cut.channels),](
        grad, x, moments, affine, z, residual, residual_moments, partial, rows, channels, parts, rows_per_part,
        act, alpha, beta, z is not None, two, cut.rows, cut.channels, config.reduction_stages(x.itemsize),
        num_warps=cut.warps,
    )  # fmt: skip
    add_parts(partial, sums)
    return sums


def masked_grad(grad: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``G`` and ``ΣG`` of every channel, [C]."""
    masked = torch.empty_like(grad)
    return masked, _launch_masked_grad(grad, None, z, masked)


def masked_grad_(grad: Tensor, other: Tensor | None, z: Tensor) -> Tensor:
    """Compute ``G`` of ``grad + other`` into ``grad``, which is lost, and ``ΣG`` of every channel, [C]."""
    return _launch_masked_grad(grad, other, z, grad)


def _launch_masked_grad(grad: Tensor, other: Tensor | None, z: Tensor, masked: Tensor) -> Tensor:
    channels = grad.shape[1]
    sums = grad.new_empty(channels, dtype=torch.float32)
    if grad.numel() == 0:
        return sums.zero_()
    rows = grad.numel() // channels
    cut, parts, rows_per_part = config.reduction(rows, channels, multiprocessors(grad.device))
    partial = sums.new_empty(1, parts, channels)
    _masked_grad_kernel[parts * ceil_div(channels, cut.channels),](
        grad, other, z, masked, partial, rows, channels, parts, rows_per_part, other is not None, cut.rows,
        cut.channels, config.reduction_stages(grad.itemsize), num_warps=cut.warps,
    )  # fmt: skip
    add_parts(partial, sums)
    return sums


def batch_norm_coefficients(
    sums: Tensor, branch: int, moments: Tensor, weight: Tensor | None, eps: float, count: int, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Finalise one branch's sums: ``dγ`` [C], ``dβ`` [C], coefficients [4, C] or [1, C]."""
    channels = moments.shape[1]
    grad_weight, grad_bias = moments.new_empty(channels), moments.new_empty(channels)
    coefficients = moments.new_empty(4 if batch_stats else 1, channels)
    _coefficients_kernel[ceil_div(channels, config.PARAMETER_CHANNELS),](
        sums, moments, weight, grad_weight, grad_bias, coefficients, channels, count, eps,
        branch, weight is not None, batch_stats, config.PARAMETER_CHANNELS,
    )  # fmt: skip
    return grad_weight, grad_bias, coefficients


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
    """Compute ``dx``, and the second branch's or ``G`` or nothing."""
    dx = torch.empty_like(x)
    if residual is not None:
        second = torch.empty_like(residual)
    else:
        second = torch.empty_like(grad[:, :masked_channels]) if masked_channels else grad.new_empty(0)
    _launch_backward(
        grad, x, affine, coefficients, z, residual, residual_coefficients, dx, second,
        (act, alpha, beta), masked_channels, masked_channel, False,
    )  # fmt: skip
    return dx, second


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
    """Compute ``dx`` into ``grad``, which is lost, and ``act(a·x + b)`` or nothing.

    Every element is read before it is written, by one thread.
    """
    activation = torch.empty_like(x) if wants_activation else x.new_empty(0)
    _launch_backward(
        grad, x, affine, coefficients, z, None, None, grad, activation, (act, alpha, beta), 0, 0, wants_activation
    )
    return activation


def _launch_backward(
    grad: Tensor,
    x: Tensor,
    affine: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    residual_coefficients: Tensor | None,
    dx: Tensor,
    second: Tensor,
    act: tuple[int, float, float],
    masked_channels: int,
    masked_channel: int,
    wants_activation: bool,
) -> None:
    rows, channels, cut, grid = one_pass(x)
    if grid:
        _backward_kernel[grid,](
            grad, x, affine, coefficients, z, residual, residual_coefficients, dx, second, rows, channels,
            *act, z is not None, residual is not None, masked_channels > 0 and residual is None, wants_activation,
            coefficients.shape[0] == 4, residual_coefficients is not None and residual_coefficients.shape[0] == 4,
            *part_of_channels(masked_channel, masked_channels, channels), cut.rows, cut.channels, num_warps=cut.warps,
        )  # fmt: skip


def add_masked_(dx: Tensor, grad: Tensor, z: Tensor | None) -> None:
    """Add ``grad``, or its ``G`` where there is ``z``, to ``dx`` in place."""
    numel = dx.numel()
    if numel:
        _add_masked_kernel[ceil_div(numel, config.FLAT_ELEMENTS),](
            dx, grad, z, numel, z is not None, config.FLAT_ELEMENTS, num_warps=config.FLAT_WARPS
        )
