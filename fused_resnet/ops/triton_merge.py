"""The second stage of a reduction on a GPU, whose first has left partial results of the rows.

Two stages make a reduction deterministic: every program reduces its part of the rows, then a small kernel merges the
parts in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.launch import ceil_div, power_of_two
from fused_resnet.ops.triton_pieces import store_affine

MERGED_CHANNELS = 8  # of one program that merges parts, at the least
MERGED_ELEMENTS = 2048  # of one that adds them up


# ---- kernels


@triton.jit
def store_merged(
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
    store_merged(
        means, m2, counts, M.to(tl.float64), inside, moments, affine, weight, bias, C, columns, mask, eps, WEIGHT, BIAS
    )


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


# ---- their launches


def merge_moments(
    partial: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rows: int, rows_per_part: int
) -> tuple[Tensor, Tensor]:
    """Merge the mean and M2 of the parts of ``rows``, [2, parts, C], into moments [3, C] and affine [2, C]."""
    _, parts, channels = partial.shape
    moments, affine = (partial.new_empty(n, channels, dtype=torch.float32) for n in (3, 2))
    _finish_stats_kernel[ceil_div(channels, MERGED_CHANNELS),](
        partial, weight, bias, moments, affine, rows, channels, parts, rows_per_part, eps,
        weight is not None, bias is not None, power_of_two(parts), MERGED_CHANNELS,
    )  # fmt: skip
    return moments, affine


def add_parts(partial: Tensor, sums: Tensor) -> None:
    """Add up the parts [rows, parts, C] of sums [rows, C], or [4, C] of three rows."""
    rows, parts, channels = partial.shape
    block = power_of_two(parts)
    together = max(MERGED_CHANNELS, MERGED_ELEMENTS // block)
    _finish_sums_kernel[ceil_div(channels, together),](partial, sums, channels, parts, rows, block, together)
