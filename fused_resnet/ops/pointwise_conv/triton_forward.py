"""A 1×1 convolution whose output is kept, on a GPU, forward: the reference's function as a Triton kernel.

Activations are channels_last, i.e. row-major matrices of M = N·H·W rows, with K channels before the convolution and N
behind it; s is the size of an element.  The sums of a batch norm are made of a tile while it is in the registers,
rounded as it is written.  A program walks through the tiles of its part of the rows and adds across threads once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.launch import ceil_div, float32_precision, multiprocessors
from fused_resnet.ops.pointwise_conv import config
from fused_resnet.ops.pointwise_conv.triton_pieces import column_sums, row_pairs
from fused_resnet.ops.triton_merge import merge_moments
from fused_resnet.ops.triton_pieces import matrix_tile, split_program, weight_tile

__all__ = ["pointwise_conv_stats"]


# ---- kernels


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _conv_stats_kernel(
    x,
    w,
    y,
    partial,
    M,
    K,
    N,
    parts,
    rows_per_part,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y = x·Wᵀ``, and its ``mean`` and ``M2 = Σ(y − mean)²`` in each part of the rows; partial [2, parts, N].

    Bytes: s an element of x (again for each tile of N, from L2) and of y.
    """
    part, columns, mask = split_program(tl.program_id(0), N, BLOCK_N)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, M)
    inputs = tl.arange(0, BLOCK_K)
    if ONE_STEP:
        weight = weight_tile(w, inputs, columns, K, N)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    # flattened, so that a tile's inputs are on their way while the sums of the one before are made
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES, flatten=not ONE_STEP):
        rows = tl.arange(0, BLOCK_M)
        left = tl.minimum(end - start, BLOCK_M).to(tl.int32)
        if ONE_STEP:
            product = tl.dot(matrix_tile(x + start * K, rows, inputs, left, K), weight, input_precision=PRECISION)
        else:
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                tile = matrix_tile(x + start * K, rows, k + inputs, left, K)
                weight = weight_tile(w, k + inputs, columns, K, N)
                product = tl.dot(tile, weight, product, input_precision=PRECISION)
        rounded = product.to(y.dtype.element_ty)
        tl.store(
            y + start * N + (rows[:, None] * N + columns[None, :]), rounded, (rows < left)[:, None] & mask[None, :]
        )
        values = rounded.to(tl.float32)
        if start == begin:
            shift = tl.sum(values, 0) / tl.minimum(end - begin, BLOCK_M).to(tl.float32)
            shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
        # a row that is not there is 0, and stays it
        centred = values - (rows < left).to(tl.float32)[:, None] * shift[None, :]
        upper, lower = row_pairs(centred, BLOCK_M, BLOCK_N)
        total += upper + lower
        squares += upper * upper
        squares += lower * lower
    column_total = column_sums(total)
    offset = column_total / (end - begin).to(tl.float32)
    m2 = tl.maximum(column_sums(squares) - column_total * offset, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # in float64: between means far from zero the differences count
    tl.store(partial + part * N + columns, shift.to(tl.float64) + offset.to(tl.float64), mask)
    tl.store(partial + (parts + part) * N + columns, m2.to(tl.float64), mask)


# ---- the functions of reference.py


def pointwise_conv_stats(
    x: Tensor, conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``y = x·Wᵀ``, its moments [3, N] and affine [2, N]."""
    outputs, inputs = conv_weight.shape[:2]
    y = torch.empty(
        (x.shape[0], outputs, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if x.numel() == 0:
        moments, affine = (x.new_full((n, outputs), torch.nan, dtype=torch.float32) for n in (3, 2))
        return y, moments, affine
    rows = x.numel() // inputs
    cut = config.statistics(inputs, outputs, x.itemsize)
    tiles = ceil_div(outputs, cut.columns)
    parts, rows_per_part = config.in_parts(rows, cut.rows, tiles, cut.programs * multiprocessors(x.device))
    partial = x.new_empty(2, parts, outputs, dtype=torch.float64)
    _conv_stats_kernel[parts * tiles,](
        x, conv_weight.flatten(1).contiguous(), y, partial, rows, inputs, outputs, parts, rows_per_part,
        float32_precision(), cut.rows, cut.columns, cut.depth, inputs <= cut.depth, cut.stages,
        num_warps=cut.warps, maxnreg=cut.registers,
    )  # fmt: skip
    return y, *merge_moments(partial, weight, bias, eps, rows, rows_per_part)
