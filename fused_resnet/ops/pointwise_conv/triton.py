"""A 1×1 convolution whose output is kept, on a GPU: the reference's functions as Triton kernels.

Activations are channels_last, i.e. row-major matrices of M = N·H·W rows, with K channels before the convolution and N
behind it; s is the size of an element.  The sums of a batch norm are made of a tile while it is in the registers,
rounded as it is written.  A program walks through the tiles of its part of the rows and adds across threads once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act.config import ceil_div
from fused_resnet.ops.batch_norm_act.triton import add_parts, merge_moments, relu_grad, split_program
from fused_resnet.ops.launch import multiprocessors
from fused_resnet.ops.pointwise_conv import config

__all__ = ["pointwise_conv_add_grad_", "pointwise_conv_stats"]


# ---- the pieces that kernels share


@triton.jit
def weight_tile(w, inputs, columns, K, N):
    """A tile of ``Wᵀ``, w being [N, K]."""
    exists = (columns < N)[:, None] & (inputs < K)[None, :]
    return tl.trans(tl.load(w + columns[:, None] * K + inputs[None, :], exists, 0.0))


@triton.jit
def matrix_tile(matrix, rows, columns, M, N):
    """A tile of a matrix [M, N], 0 outside."""
    return tl.load(matrix + (rows[:, None] * N + columns[None, :]), (rows < M)[:, None] & (columns < N)[None, :], 0.0)


@triton.jit
def row_pairs(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's rows as pairs that are 8 apart, two times [BLOCK_M / 16, 8, BLOCK_N].

    A thread that holds a product's row holds the one 8 further, too: what adds them needs half of the registers, and
    nothing is shuffled.
    """
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M // 16, 2, 8, BLOCK_N)), (0, 2, 3, 1)))


@triton.jit
def column_sums(pairs):
    """The sums of what :func:`row_pairs` gives, over the rows."""
    return tl.sum(tl.sum(pairs, 0), 0)


# ---- forward


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


# ---- backward


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _conv_add_grad_kernel(
    d_source,
    dy,
    w,
    x,
    partial,
    M,
    K,
    N,
    parts,
    rows_per_part,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
    ONE_STEP: tl.constexpr,
    WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``G = (d_source + dy·W)`` or 0 where ``x <= 0``, and ``ΣG`` of each part of the rows; partial [1, parts, K].

    With WEIGHT, where all of N is one step, ``dW = dyᵀ·x`` of each part, too: in front of ``ΣG``, [1, parts, N·K + K].

    Bytes: 3s an element of d_source, s an element of dy (again for each tile of K, from L2).
    """
    part, columns, mask = split_program(tl.program_id(0), K, BLOCK_K)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, M)
    outputs = tl.arange(0, DEPTH)
    if ONE_STEP:
        weight = matrix_tile(w, outputs, columns, N, K)
    if WEIGHT:
        tl.static_assert(ONE_STEP, "a program holds the weight gradient of all outputs")
        d_weight = tl.zeros((DEPTH, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_M // 16, 8, BLOCK_K), tl.float32)
    rows = tl.arange(0, BLOCK_M)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        left = tl.minimum(end - start, BLOCK_M).to(tl.int32)
        # asked for before the product, and used behind it
        shortcut = matrix_tile(d_source + start * K, rows, columns, left, K)
        activation = matrix_tile(x + start * K, rows, columns, left, K)
        if ONE_STEP:
            tile = matrix_tile(dy + start * N, rows, outputs, left, N)
            product = tl.dot(tile, weight, input_precision=PRECISION)
            if WEIGHT:
                d_weight = tl.dot(tl.trans(tile), activation, d_weight, input_precision=PRECISION)
        else:
            product = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for n in tl.range(0, N, DEPTH, num_stages=STAGES):
                tile = matrix_tile(dy + start * N, rows, n + outputs, left, N)
                weight = matrix_tile(w, n + outputs, columns, N, K)
                product = tl.dot(tile, weight, product, input_precision=PRECISION)
        rounded = relu_grad(shortcut.to(tl.float32) + product, activation.to(tl.float32)).to(shortcut.dtype)
        inside = (rows < left)[:, None] & mask[None, :]
        tl.store(d_source + start * K + (rows[:, None] * K + columns[None, :]), rounded, inside)
        upper, lower = row_pairs(rounded.to(tl.float32), BLOCK_M, BLOCK_K)
        total += upper + lower
    out = partial + part * K
    if WEIGHT:
        out += part * N * K
        tl.store(out + outputs[:, None] * K + columns[None, :], d_weight, (outputs < N)[:, None] & mask[None, :])
        out += N * K
    tl.store(out + columns, column_sums(total), mask)


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


def pointwise_conv_add_grad_(
    d_source: Tensor, dy: Tensor, conv_weight: Tensor, x: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor]:
    """Compute ``G`` of ``d_source + dy·W`` into ``d_source``; returns ``ΣG`` [K], and dW [N, K, 1, 1] or nothing."""
    outputs, inputs = conv_weight.shape[:2]
    weights = inputs * outputs if wants_weight else 0
    sums = d_source.new_empty(1, weights + inputs, dtype=torch.float32)
    rows = d_source.numel() // inputs
    if rows == 0:
        sums.zero_()
    else:
        cut = config.add_grad(inputs, outputs, d_source.itemsize, wants_weight)
        tiles = ceil_div(inputs, cut.columns)
        parts, rows_per_part = config.in_parts(rows, cut.rows, tiles, cut.programs * multiprocessors(d_source.device))
        partial = sums.new_empty(1, parts, sums.shape[1])
        _conv_add_grad_kernel[parts * tiles,](
            d_source, dy, conv_weight.flatten(1).contiguous(), x, partial, rows, inputs, outputs, parts, rows_per_part,
            float32_precision(), cut.rows, cut.columns, cut.depth, outputs <= cut.depth, wants_weight, cut.stages,
            num_warps=cut.warps, maxnreg=cut.registers,
        )  # fmt: skip
        add_parts(partial, sums)
    d_conv_weight, sum_grad = sums[0].split([weights, inputs])
    return sum_grad, d_conv_weight.view(conv_weight.shape) if wants_weight else d_conv_weight


def float32_precision() -> str:
    """Return how products of float32 are made, which torch's switch decides at every call."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
