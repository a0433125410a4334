"""Batch norm, optional second branch and activation on a GPU, forward: the reference's functions as Triton kernels.

An activation is channels_last, i.e. a row-major matrix [M, C] of M = N·H·W rows; s is the size of an element.  All
arithmetic is in float32, the per-channel steps are in float64.  What is named here is defined in ``reference.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act import config
from fused_resnet.ops.batch_norm_act.reference import update_running_stats_
from fused_resnet.ops.batch_norm_act.triton_pieces import in_part, one_pass, part_of_channels
from fused_resnet.ops.launch import ceil_div, multiprocessors, power_of_two
from fused_resnet.ops.triton_activation import act
from fused_resnet.ops.triton_merge import MERGED_CHANNELS, merge_moments, store_merged
from fused_resnet.ops.triton_pieces import scale_shift, split_program, store_affine

__all__ = [
    "batch_norm_act",
    "batch_norm_act_",
    "batch_norm_affine",
    "batch_norm_merge",
    "batch_norm_stats",
    "update_running_stats_",  # the reference's own: a few of torch's launches for all norms of a chain
]


# ---- kernels


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
    store_merged(means, m2, counts, count, inside, moments, affine, weight, bias, C, columns, mask, eps, WEIGHT, BIAS)


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
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
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
            side_at, side_inside = in_part(rows, columns, inside, PART_CHANNEL, PART_CHANNELS)
        else:
            side_at, side_inside = at, inside
        side = tl.load(residual + side_at, side_inside, 0.0).to(tl.float32)
        if RESIDUAL_AFFINE:
            side = scale_shift(side, residual_affine, C, columns, mask)
        value += side
    tl.store(z + at, act(value, ACT, ALPHA, BETA).to(z.dtype.element_ty), inside)


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
    _stats_kernel[parts * ceil_div(channels, cut.channels),](
        x, partial, rows, channels, parts, rows_per_part, cut.rows, cut.channels, config.reduction_stages(x.itemsize),
        num_warps=cut.warps,
    )  # fmt: skip
    return merge_moments(partial, weight, bias, eps, rows, rows_per_part)


def batch_norm_merge(parts: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Merge the statistics of parts of a batch, [R, 2C + 1], into moments [3, C] and affine [2, C]."""
    count, channels = parts.shape[0], parts.shape[1] // 2
    moments, affine = (parts.new_empty(n, channels) for n in (3, 2))
    _merge_kernel[ceil_div(channels, MERGED_CHANNELS),](
        parts, weight, bias, moments, affine, channels, count, eps,
        weight is not None, bias is not None, power_of_two(count), MERGED_CHANNELS,
    )  # fmt: skip
    return moments, affine


def batch_norm_affine(moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute scale and shift [2, C] from given moments."""
    channels = moments.shape[1]
    affine = moments.new_empty(2, channels)
    _affine_kernel[ceil_div(channels, config.PARAMETER_CHANNELS),](
        moments, weight, bias, affine, channels, eps, weight is not None, bias is not None, config.PARAMETER_CHANNELS
    )
    return affine


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
    """Compute ``z = act(a·x + b + R)``."""
    z = torch.empty_like(x)
    _launch_act(x, affine, residual, residual_affine, z, (act, alpha, beta), residual_channel)
    return z


def batch_norm_act_(
    x: Tensor,
    affine: Tensor,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    act: int,
    alpha: float,
    beta: float,
) -> None:
    """Compute ``z`` into ``x``, which is lost: every element is read before it is written, by one thread."""
    _launch_act(x, affine, residual, residual_affine, x, (act, alpha, beta), 0)


def _launch_act(
    x: Tensor,
    affine: Tensor,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    z: Tensor,
    act: tuple[int, float, float],
    residual_channel: int,
) -> None:
    rows, channels, cut, grid = one_pass(x)
    part = (0, 0) if residual is None else part_of_channels(residual_channel, residual.shape[1], channels)
    if grid:
        _act_kernel[grid,](
            x, affine, residual, residual_affine, z, rows, channels, residual is not None, residual_affine is not None,
            *act, *part, cut.rows, cut.channels, num_warps=cut.warps,
        )  # fmt: skip
