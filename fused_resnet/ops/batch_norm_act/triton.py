"""Batch norm, optional second branch and ReLU on a GPU: the reference's functions as Triton kernels.

An activation is channels_last, i.e. a row-major matrix [M, C] of M = N·H·W rows; s is the size of an element.  All
arithmetic is in float32, the per-channel steps are in float64.  What is named here is defined in ``reference.py``.

A reduction has two stages, which makes it deterministic: every program reduces its part of the rows, then a small
kernel merges the parts in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act import config
from fused_resnet.ops.batch_norm_act.reference import update_running_stats_
from fused_resnet.ops.launch import multiprocessors

__all__ = [
    "add_masked_",
    "batch_norm_act",
    "batch_norm_act_",
    "batch_norm_act_backward",
    "batch_norm_act_backward_",
    "batch_norm_act_reduce",
    "batch_norm_affine",
    "batch_norm_coefficients",
    "batch_norm_stats",
    "masked_grad",
    "masked_grad_",
    "update_running_stats_",
]

MERGED_CHANNELS = 8  # of one program that merges parts, at the least
MERGED_ELEMENTS = 2048  # of one that adds them up
PARAMETER_CHANNELS = 128  # of one program of a per-channel step


# ---- the pieces that kernels share


@triton.jit
def split_program(pid, C, BLOCK_C: tl.constexpr):
    """Split a program's number into its tile of rows and its channels; channels run fastest, so that neighbours in
    time are neighbours in memory.
    """
    tiles = tl.cdiv(C, BLOCK_C)
    columns = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // tiles).to(tl.int64), columns, columns < C


@triton.jit
def scale_shift(x, affine, C, columns, mask):
    """``a·x + b``"""
    a = tl.load(affine + columns, mask, 0.0)
    b = tl.load(affine + C + columns, mask, 0.0)
    return x * a[None, :] + b[None, :]


@triton.jit
def _act(value, RELU: tl.constexpr):
    """ReLU, which NaN passes, or the value itself."""
    if RELU:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def _in_part(rows, columns, inside, CHANNEL: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a tile is in a tensor of only ``CHANNELS`` channels, from ``CHANNEL`` on: offsets, and what it has.

    Constants, so that the compiler sees which of the tile's 16-byte accesses are whole.
    """
    columns -= CHANNEL
    has = (columns >= 0) & (columns < CHANNELS)
    return rows[:, None] * CHANNELS + columns[None, :], inside & has[None, :]


@triton.jit
def relu_grad(grad, value):
    """``G``: grad, or 0 where ``value <= 0``; NaN passes."""
    return tl.where(value <= 0, 0.0, grad)


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


@triton.jit
def store_affine(affine, mean, var, weight, bias, C, columns, mask, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """``a = γ/√(var + eps)``, ``b = β − mean·a`` of the rounded ``a``; mean and var as they were stored, float32."""
    scale = 1.0 / tl.sqrt(var.to(tl.float64) + eps)
    if WEIGHT:
        scale *= tl.load(weight + columns, mask, 0.0).to(tl.float64)
    rounded = scale.to(tl.float32)
    shift = -mean.to(tl.float64) * rounded.to(tl.float64)
    if BIAS:
        shift += tl.load(bias + columns, mask, 0.0).to(tl.float64)
    tl.store(affine + columns, rounded, mask)
    tl.store(affine + C + columns, shift.to(tl.float32), mask)


# ---- forward


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _stats_kernel(
    x, partial, M, C, parts, rows_per_part, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr
):
    """``mean`` and ``M2 = Σ(x − mean)²`` of each part of the rows; partial [2, parts, C].  Bytes: s an element.

    Sums of ``x − shift`` with a shift near the mean, that of the part's first tile: the difference of large numbers
    Σx² − (Σx)²/m never arises.  A shift must be finite, so that an infinite element gives what stock gives.
    """
    part, columns, mask = split_program(tl.program_id(0), C, BLOCK_C)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, M)
    rows = begin + tl.arange(0, BLOCK_M)
    inside = (rows < end)[:, None] & mask[None, :]
    lead = tl.load(x + rows[:, None] * C + columns[None, :], inside, 0.0).to(tl.float32)
    shift = tl.sum(lead, 0) / tl.minimum(end - begin, BLOCK_M).to(tl.float32)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < end)[:, None] & mask[None, :]
        values = tl.load(x + rows[:, None] * C + columns[None, :], inside, 0.0).to(tl.float32)
        centred = tl.where(inside, values - shift[None, :], 0.0)
        total += centred
        squares += centred * centred
    column_total = tl.sum(total, 0)
    offset = column_total / (end - begin).to(tl.float32)
    m2 = tl.maximum(tl.sum(squares, 0) - column_total * offset, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # in float64: between means far from zero the differences count
    tl.store(partial + part * C + columns, shift.to(tl.float64) + offset.to(tl.float64), mask)
    tl.store(partial + (parts + part) * C + columns, m2.to(tl.float64), mask)


@triton.jit
def _store_merged(
    means,
    m2,
    counts,
    count,
    inside,
    moments,
    affine,
    weight,
    bias,
    C,
    columns,
    mask,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """``mean = Σ m_i·mean_i / m``, ``var = (Σ M2_i + Σ m_i·(mean_i − mean)²) / m``; then the affine.

    Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    mean = tl.sum(means * counts, 0) / count
    deviation = tl.where(inside, means - mean[None, :], 0.0)
    var = tl.sum(m2 + counts * deviation * deviation, 0) / count
    rounded_mean, rounded_var = mean.to(tl.float32), var.to(tl.float32)
    tl.store(moments + columns, rounded_mean, mask)
    tl.store(moments + C + columns, rounded_var, mask)
    tl.store(moments + 2 * C + columns, (var * (count / tl.maximum(count - 1.0, 1.0))).to(tl.float32), mask)
    store_affine(affine, rounded_mean, rounded_var, weight, bias, C, columns, mask, eps, WEIGHT, BIAS)


@triton.jit(do_not_specialize=["M", "parts", "rows_per_part", "eps"])
def _finish_stats_kernel(
    partial,
    weight,
    bias,
    moments,
    affine,
    M,
    C,
    parts,
    rows_per_part,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge the parts of one reduction; all but the last have ``rows_per_part`` of the M rows."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    part = tl.arange(0, BLOCK_P)
    inside = (part < parts)[:, None] & mask[None, :]
    counts = tl.maximum(tl.minimum(M - part.to(tl.int64) * rows_per_part, rows_per_part), 0).to(tl.float64)[:, None]
    means = tl.load(partial + part[:, None] * C + columns[None, :], inside, 0.0)
    m2 = tl.load(partial + (parts + part)[:, None] * C + columns[None, :], inside, 0.0)
    _store_merged(
        means, m2, counts, M.to(tl.float64), inside, moments, affine, weight, bias, C, columns, mask, eps, WEIGHT, BIAS
    )


@triton.jit(do_not_specialize=["parts", "eps"])
def _merge_kernel(
    gathered,
    weight,
    bias,
    moments,
    affine,
    C,
    parts,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge parts that say what they are of: C means, C times M2, and a count each."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    part = tl.arange(0, BLOCK_P)
    inside = (part < parts)[:, None] & mask[None, :]
    row = gathered + (part * (2 * C + 1))[:, None]
    counts = tl.load(row + 2 * C, (part < parts)[:, None], 0.0).to(tl.float64)
    means = tl.load(row + columns[None, :], inside, 0.0).to(tl.float64)
    m2 = tl.load(row + C + columns[None, :], inside, 0.0).to(tl.float64)
    count = tl.maximum(tl.sum(tl.sum(counts, 0), 0), 1.0)
    _store_merged(means, m2, counts, count, inside, moments, affine, weight, bias, C, columns, mask, eps, WEIGHT, BIAS)


@triton.jit(do_not_specialize=["eps"])
def _affine_kernel(
    moments, weight, bias, affine, C, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """``a = γ/√(var + eps)``, ``b = β − mean·a``"""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    mean, var = tl.load(moments + columns, mask, 0.0), tl.load(moments + C + columns, mask, 1.0)
    store_affine(affine, mean, var, weight, bias, C, columns, mask, eps, WEIGHT, BIAS)


@triton.jit(do_not_specialize=["M"])
def _act_kernel(
    x,
    affine,
    residual,
    residual_affine,
    z,
    M,
    C,
    RESIDUAL: tl.constexpr,
    RESIDUAL_AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    PART_CHANNEL: tl.constexpr,
    PART_CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``z = act(a·x + b + R)``, R = 0, residual, or ``a_r·residual + b_r``; the residual has all channels or a part.

    Bytes: 2s an element, and s for each of the residual.
    """
    tile, columns, mask = split_program(tl.program_id(0), C, BLOCK_C)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows[:, None] * C + columns[None, :]
    inside = (rows < M)[:, None] & mask[None, :]
    value = scale_shift(tl.load(x + at, inside, 0.0).to(tl.float32), affine, C, columns, mask)
    if RESIDUAL:
        if PART_CHANNELS:
            side_at, side_inside = _in_part(rows, columns, inside, PART_CHANNEL, PART_CHANNELS)
        else:
            side_at, side_inside = at, inside
        side = tl.load(residual + side_at, side_inside, 0.0).to(tl.float32)
        if RESIDUAL_AFFINE:
            side = scale_shift(side, residual_affine, C, columns, mask)
        value += side
    tl.store(z + at, _act(value, RELU).to(z.dtype.element_ty), inside)


# ---- backward


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
    RELU: tl.constexpr,
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
        if RELU:
            if Z:
                masked = relu_grad(masked, tl.load(z + at, inside, 0.0).to(tl.float32))
            else:
                masked = relu_grad(masked, scale_shift(values, affine, C, columns, mask))
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


@triton.jit(do_not_specialize=["parts"])
def _finish_sums_kernel(partial, sums, C, parts, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Add the parts up, in float64: partial [ROWS, parts, C], sums [ROWS, C].  Of three rows, the sums of two branches,
    the first is ΣG of both, and there twice: sums [4, C].
    """
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    part = tl.arange(0, BLOCK_P)
    inside = (part < parts)[:, None] & mask[None, :]
    at = partial + part[:, None] * C + columns[None, :]
    for row in tl.static_range(ROWS):
        total = tl.sum(tl.load(at + row * parts * C, inside, 0.0).to(tl.float64), 0).to(tl.float32)
        tl.store(sums + (row if row < 2 else 3) * C + columns, total, mask)
        if ROWS == 3 and row == 0:
            tl.store(sums + 2 * C + columns, total, mask)


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
    RELU: tl.constexpr,
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
    if RELU:
        masked = relu_grad(masked, tl.load(z + at, inside, 0.0).to(tl.float32) if Z else value)
    result = _input_gradient(masked, values, coefficients, C, columns, mask, BATCH_STATS)
    tl.store(dx + at, result.to(dx.dtype.element_ty), inside)
    if RESIDUAL:
        side = tl.load(residual + at, inside, 0.0).to(tl.float32)
        result = _input_gradient(masked, side, residual_coefficients, C, columns, mask, RESIDUAL_BATCH_STATS)
        tl.store(second + at, result.to(second.dtype.element_ty), inside)
    if WRITE_MASKED:
        if PART_CHANNELS:
            at, inside = _in_part(rows, columns, inside, PART_CHANNEL, PART_CHANNELS)
        tl.store(second + at, masked.to(second.dtype.element_ty), inside)
    if WRITE_ACTIVATION:
        tl.store(second + at, _act(value, RELU).to(second.dtype.element_ty), inside)


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


def batch_norm_stats(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Compute every channel's moments [3, C] and affine [2, C]."""
    channels = x.shape[1]
    rows = x.numel() // max(channels, 1)
    if x.numel() == 0:
        moments, affine = (x.new_full((n, channels), torch.nan, dtype=torch.float32) for n in (3, 2))
        return moments, affine
    cut, parts, rows_per_part = config.reduction(rows, channels, multiprocessors(x.device))
    partial = x.new_empty(2, parts, channels, dtype=torch.float64)
    _stats_kernel[parts * config.ceil_div(channels, cut.channels),](
        x, partial, rows, channels, parts, rows_per_part, cut.rows, cut.channels, config.reduction_stages(x.itemsize),
        num_warps=cut.warps,
    )  # fmt: skip
    return merge_moments(partial, weight, bias, eps, rows, rows_per_part)


def merge_moments(
    partial: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rows: int, rows_per_part: int
) -> tuple[Tensor, Tensor]:
    """Merge the mean and M2 of the parts of ``rows``, [2, parts, C], into moments [3, C] and affine [2, C]."""
    _, parts, channels = partial.shape
    moments, affine = (partial.new_empty(n, channels, dtype=torch.float32) for n in (3, 2))
    _finish_stats_kernel[config.ceil_div(channels, MERGED_CHANNELS),](
        partial, weight, bias, moments, affine, rows, channels, parts, rows_per_part, eps,
        weight is not None, bias is not None, config.power_of_two(parts), MERGED_CHANNELS,
    )  # fmt: skip
    return moments, affine


def batch_norm_merge(parts: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Merge the statistics of parts of a batch, [R, 2C + 1], into moments [3, C] and affine [2, C]."""
    count, channels = parts.shape[0], parts.shape[1] // 2
    moments, affine = (parts.new_empty(n, channels) for n in (3, 2))
    _merge_kernel[config.ceil_div(channels, MERGED_CHANNELS),](
        parts, weight, bias, moments, affine, channels, count, eps,
        weight is not None, bias is not None, config.power_of_two(count), MERGED_CHANNELS,
    )  # fmt: skip
    return moments, affine


def batch_norm_affine(moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute scale and shift [2, C] from given moments."""
    channels = moments.shape[1]
    affine = moments.new_empty(2, channels)
    _affine_kernel[config.ceil_div(channels, PARAMETER_CHANNELS),](
        moments, weight, bias, affine, channels, eps, weight is not None, bias is not None, PARAMETER_CHANNELS
    )
    return affine


def batch_norm_act(
    x: Tensor,
    affine: Tensor,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    relu: bool,
    residual_channel: int = 0,
) -> Tensor:
    """Compute ``z = act(a·x + b + R)``."""
    z = torch.empty_like(x)
    _launch_act(x, affine, residual, residual_affine, z, relu, residual_channel)
    return z


def batch_norm_act_(
    x: Tensor, affine: Tensor, residual: Tensor | None, residual_affine: Tensor | None, relu: bool
) -> None:
    """Compute ``z`` into ``x``, which is lost: every element is read before it is written, by one thread."""
    _launch_act(x, affine, residual, residual_affine, x, relu, 0)


def _launch_act(
    x: Tensor,
    affine: Tensor,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    z: Tensor,
    relu: bool,
    residual_channel: int,
) -> None:
    rows, channels, cut, grid = _pass(x)
    part = (0, 0) if residual is None else _part(residual_channel, residual.shape[1], channels)
    if grid:
        _act_kernel[grid,](
            x, affine, residual, residual_affine, z, rows, channels, residual is not None, residual_affine is not None,
            relu, *part, cut.rows, cut.channels, num_warps=cut.warps,
        )  # fmt: skip


def batch_norm_act_reduce(
    grad: Tensor,
    x: Tensor,
    moments: Tensor,
    affine: Tensor,
    z: Tensor | None,
    residual: Tensor | None,
    residual_moments: Tensor | None,
    relu: bool,
) -> Tensor:
    """Compute ``ΣG`` and ``ΣG·(x − mean)`` of every channel, and of the second branch; sums [2, C] or [4, C]."""
    channels, two = x.shape[1], residual is not None
    sums = moments.new_empty(4 if two else 2, channels)
    if x.numel() == 0:
        return sums.zero_()
    rows = x.numel() // channels
    cut, parts, rows_per_part = config.reduction(rows, channels, multiprocessors(x.device))
    partial = moments.new_empty(3 if two else 2, parts, channels)
    _reduce_kernel[parts * config.ceil_div(channels, cut.channels),](
        grad, x, moments, affine, z, residual, residual_moments, partial, rows, channels, parts, rows_per_part,
        relu, z is not None, two, cut.rows, cut.channels, config.reduction_stages(x.itemsize), num_warps=cut.warps,
    )  # fmt: skip
    add_parts(partial, sums)
    return sums


def add_parts(partial: Tensor, sums: Tensor) -> None:
    """Add up the parts [rows, parts, C] of sums [rows, C], or [4, C] of three rows."""
    rows, parts, channels = partial.shape
    block = config.power_of_two(parts)
    together = max(MERGED_CHANNELS, MERGED_ELEMENTS // block)
    _finish_sums_kernel[config.ceil_div(channels, together),](partial, sums, channels, parts, rows, block, together)


def batch_norm_coefficients(
    sums: Tensor, branch: int, moments: Tensor, weight: Tensor | None, eps: float, count: int, batch_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Finalise one branch's sums: ``dγ`` [C], ``dβ`` [C], coefficients [4, C] or [1, C]."""
    channels = moments.shape[1]
    grad_weight, grad_bias = moments.new_empty(channels), moments.new_empty(channels)
    coefficients = moments.new_empty(4 if batch_stats else 1, channels)
    _coefficients_kernel[config.ceil_div(channels, PARAMETER_CHANNELS),](
        sums, moments, weight, grad_weight, grad_bias, coefficients, channels, count, eps,
        branch, weight is not None, batch_stats, PARAMETER_CHANNELS,
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
    relu: bool,
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
        grad, x, affine, coefficients, z, residual, residual_coefficients, dx, second, relu, masked_channels,
        masked_channel, False,
    )  # fmt: skip
    return dx, second


def batch_norm_act_backward_(
    grad: Tensor,
    x: Tensor,
    affine: Tensor,
    coefficients: Tensor,
    z: Tensor | None,
    relu: bool,
    wants_activation: bool,
) -> Tensor:
    """Compute ``dx`` into ``grad``, which is lost, and ``act(a·x + b)`` or nothing.

    Every element is read before it is written, by one thread.
    """
    activation = torch.empty_like(x) if wants_activation else x.new_empty(0)
    _launch_backward(grad, x, affine, coefficients, z, None, None, grad, activation, relu, 0, 0, wants_activation)
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
    relu: bool,
    masked_channels: int,
    masked_channel: int,
    wants_activation: bool,
) -> None:
    rows, channels, cut, grid = _pass(x)
    if grid:
        _backward_kernel[grid,](
            grad, x, affine, coefficients, z, residual, residual_coefficients, dx, second, rows, channels,
            relu, z is not None, residual is not None, masked_channels > 0 and residual is None, wants_activation,
            coefficients.shape[0] == 4, residual_coefficients is not None and residual_coefficients.shape[0] == 4,
            *_part(masked_channel, masked_channels, channels), cut.rows, cut.channels, num_warps=cut.warps,
        )  # fmt: skip


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
    _masked_grad_kernel[parts * config.ceil_div(channels, cut.channels),](
        grad, other, z, masked, partial, rows, channels, parts, rows_per_part, other is not None, cut.rows,
        cut.channels, config.reduction_stages(grad.itemsize), num_warps=cut.warps,
    )  # fmt: skip
    add_parts(partial, sums)
    return sums


def add_masked_(dx: Tensor, grad: Tensor, z: Tensor | None, relu: bool) -> None:
    """Add ``G`` to ``dx`` in place."""
    numel = dx.numel()
    if numel:
        _add_masked_kernel[config.ceil_div(numel, config.FLAT_ELEMENTS),](
            dx, grad, z, numel, relu and z is not None, config.FLAT_ELEMENTS, num_warps=config.FLAT_WARPS
        )


def _part(channel: int, part: int, channels: int) -> tuple[int, int]:
    """Return a kernel's PART_CHANNEL and PART_CHANNELS: where a part of the channels is; zeros for all of them."""
    return (channel, part) if part < channels else (0, 0)


def _pass(x: Tensor) -> tuple[int, int, config.Tile, int]:
    """Return rows, channels, tile and number of programs of one pass over an activation."""
    channels = x.shape[1]
    rows = x.numel() // max(channels, 1)
    cut = config.tile(channels, config.PASS_ELEMENTS, config.PASS_WARPS)
    return rows, channels, cut, config.ceil_div(rows, cut.rows) * config.ceil_div(channels, cut.channels)
