"""A 1×1 convolution whose output is kept, on a GPU, backward: the reference's function as a Triton kernel.

Activations, and how a program walks through them, are those of ``triton_forward.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.launch import ceil_div, float32_precision, multiprocessors
from fused_resnet.ops.pointwise_conv import config
from fused_resnet.ops.pointwise_conv.triton_pieces import column_sums, row_pairs
from fused_resnet.ops.triton_activation import relu_grad
from fused_resnet.ops.triton_merge import add_parts
from fused_resnet.ops.triton_pieces import matrix_tile, split_program

__all__ = ["pointwise_conv_add_grad_"]


# ---- kernels


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
