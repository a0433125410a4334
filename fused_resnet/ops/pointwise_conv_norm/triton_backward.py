"""A 1×1 convolution and its batch norm on a GPU, backward: the reference's function as Triton kernels.

Activations are those of ``triton_forward.py``.  What batch norm's backward would read of ``y`` is in the products
``vᵀG`` and ``vᵀv``, with the centred input ``v`` of ``triton_gram.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.activation import Act
from fused_resnet.ops.launch import ceil_div, float32_precision, multiprocessors
from fused_resnet.ops.pointwise_conv.config import in_parts
from fused_resnet.ops.pointwise_conv_norm import config
from fused_resnet.ops.pointwise_conv_norm.triton_gram import (
    centred_tile,
    covariance_tile,
    gram_of,
    is_relu,
    missed_mean,
    prologue_of,
)
from fused_resnet.ops.triton_activation import relu_grad
from fused_resnet.ops.triton_merge import add_parts
from fused_resnet.ops.triton_pieces import matrix_tile, scale_shift, split_program

__all__ = ["pointwise_conv_norm_backward"]


# ---- kernels


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _wgrad_kernel(
    grad,
    x,
    prologue,
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
    STAGES: tl.constexpr,
):
    """``vᵀG`` of each part of the rows; partial [1, parts, K·N].

    Bytes: s an element of G (again for each tile of K, from L2) and of x (for each tile of N).
    """
    pid = tl.program_id(0)
    n_tiles, k_tiles = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tile, k_tile = pid % n_tiles, pid // n_tiles % k_tiles
    part = (pid // (n_tiles * k_tiles)).to(tl.int64)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, M)
    inputs = k_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        left = tl.minimum(end - start, BLOCK_M).to(tl.int32)
        v = centred_tile(x + start * K, prologue, rows, left, inputs, K)
        g = matrix_tile(grad + start * N, rows, outputs, left, N)
        product = tl.dot(tl.trans(v), g, product, input_precision=PRECISION)
    inside = (inputs < K)[:, None] & (outputs < N)[None, :]
    tl.store(partial + part * (K * N) + inputs[:, None] * N + outputs[None, :], product, inside)


@triton.jit
def _weight_sums(sums, gram, g, inputs, outputs, K, N, count):
    """``R = Gᵀv − ΣG·(Σv/m)``, a tile [outputs, inputs]; g is ``ΣG``."""
    product = tl.trans(matrix_tile(sums, inputs, outputs, K, N))
    return product - g[:, None] * missed_mean(gram, inputs, K, count)[None, :]


@triton.jit
def _finish_weights_kernel(
    sums,
    gram,
    sum_grad,
    w,
    moments,
    weight,
    d_weight,
    d_gamma,
    folded,
    slope,
    K,
    N,
    count,
    eps,
    WEIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dγ = rstd·⟨R, W⟩``, ``slope = k = rstd·dγ/m``, ``dW = a·(R − k·W·S)`` and ``Wa = a·W``, N outputs at a time.

    sums [K·N] are ``vᵀG``, gram [K·K + K] ``vᵀv`` and ``Σv``; R and S are those of ``u`` about its mean, which differ
    by what c missed of it.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = outputs < N
    var = tl.load(moments + N + outputs, there, 1.0)
    rstd = 1.0 / tl.sqrt(var.to(tl.float64) + eps)
    a = rstd
    if WEIGHT:
        a = rstd * tl.load(weight + outputs, there, 0.0).to(tl.float64)
    a = a.to(tl.float32)[:, None]
    g = tl.load(sum_grad + outputs, there, 0.0)
    product = tl.zeros((BLOCK_N,), tl.float64)
    for k in range(0, K, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        r = _weight_sums(sums, gram, g, inputs, outputs, K, N, count)
        tile = matrix_tile(w, outputs, inputs, N, K).to(tl.float32)
        tl.store(
            folded + outputs[:, None] * K + inputs[None, :],
            (a * tile).to(folded.dtype.element_ty),
            there[:, None] & (inputs < K)[None, :],
        )
        product += tl.sum(r.to(tl.float64) * tile.to(tl.float64), 1)
    gamma = rstd * product
    tl.store(d_gamma + outputs, gamma.to(tl.float32), there)
    s = (rstd * gamma / count).to(tl.float32)
    tl.store(slope + outputs, s, there)
    for k in range(0, K, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        correction = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for j in range(0, K, BLOCK_K):
            others = j + tl.arange(0, BLOCK_K)
            scaled = s[:, None] * matrix_tile(w, outputs, others, N, K).to(tl.float32)
            covariance = covariance_tile(gram, others, inputs, K, count)
            correction = tl.dot(scaled, covariance, correction, input_precision="ieee")
        d = a * (_weight_sums(sums, gram, g, inputs, outputs, K, N, count) - correction)
        tl.store(d_weight + outputs[:, None] * K + inputs[None, :], d, there[:, None] & (inputs < K)[None, :])


@triton.jit
def _finish_mixing_kernel(
    gram,
    sum_grad,
    w,
    slope,
    folded,
    mixing,
    row,
    K,
    N,
    count,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``−M = −(k·W)ᵀ·Wa`` in PARTS parts of the dtype, high and low, and ``−(ΣG/m)·Wa + (Σv/m)·M``, K inputs at a time.

    The row is what every pixel gets; its error would be that of every pixel, so that it is added up in float64.
    """
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = columns < K
    total = tl.zeros((BLOCK_K,), tl.float64)
    for n in range(0, N, BLOCK_N):
        outputs = n + tl.arange(0, BLOCK_N)
        g = tl.load(sum_grad + outputs, outputs < N, 0.0).to(tl.float64) / count
        total -= tl.sum(g[:, None] * matrix_tile(folded, outputs, columns, N, K).to(tl.float64), 0)
    for j in range(0, K, BLOCK_J):
        inputs = j + tl.arange(0, BLOCK_J)
        m = tl.zeros((BLOCK_J, BLOCK_K), tl.float32)
        for n in range(0, N, BLOCK_N):
            outputs = n + tl.arange(0, BLOCK_N)
            s = tl.load(slope + outputs, outputs < N, 0.0)
            scaled = s[:, None] * matrix_tile(w, outputs, inputs, N, K).to(tl.float32)
            m = tl.dot(
                tl.trans(scaled), matrix_tile(folded, outputs, columns, N, K).to(tl.float32), m, input_precision="ieee"
            )
        rest = -m
        missed = missed_mean(gram, inputs, K, count)
        for part in tl.static_range(PARTS):
            rounded = rest.to(mixing.dtype.element_ty)
            at = part * K * K + inputs[:, None] * K + columns[None, :]
            tl.store(mixing + at, rounded, (inputs < K)[:, None] & mask[None, :])
            total -= tl.sum(missed[:, None] * rounded.to(tl.float32), 0).to(tl.float64)
            rest -= rounded.to(tl.float32)
    tl.store(row + columns, total.to(tl.float32), mask)


@triton.jit(do_not_specialize=["M", "tiles"])
def _dgrad_kernel(
    grad,
    x,
    x_affine,
    x_moments,
    prologue,
    folded,
    mixing,
    row,
    du,
    partial,
    M,
    K,
    N,
    tiles,
    SUMS: tl.constexpr,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``du = G·Wa + v·(−M) + row`` with ``−M`` in PARTS parts of the dtype, high and low; mixing [PARTS, K, K].

    Where SUMS, also ``Σg`` and ``Σg·(x − mean)`` of each tile of rows, with ``g = du``, or 0 where RELU and
    ``a·x + b <= 0``; partial [2, tiles, K].  A program that walked through tiles would hold the sums and every address
    of the loops within: it spills.

    Bytes: s an element of G, of x and of du (G and x again for each tile of K, from L2).
    """
    tile, columns, mask = split_program(tl.program_id(0), K, BLOCK_K)
    start = tile * BLOCK_M
    rows, left = tl.arange(0, BLOCK_M), tl.minimum(M - start, BLOCK_M).to(tl.int32)
    grad += start * N
    x += start * K
    du += start * K
    gradient = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in tl.range(0, N, DEPTH, num_stages=STAGES):
        outputs = n + tl.arange(0, DEPTH)
        weight = matrix_tile(folded, outputs, columns, N, K)
        gradient = tl.dot(matrix_tile(grad, rows, outputs, left, N), weight, gradient, input_precision=PRECISION)
    for k in tl.range(0, K, DEPTH, num_stages=STAGES):
        inputs = k + tl.arange(0, DEPTH)
        v = centred_tile(x, prologue, rows, left, inputs, K)
        for part in tl.static_range(PARTS):
            m = matrix_tile(mixing + part * K * K, inputs, columns, K, K)
            gradient = tl.dot(v, m, gradient, input_precision=PRECISION)
    gradient += tl.load(row + columns, mask, 0.0)[None, :]
    rounded = gradient.to(du.dtype.element_ty)
    tl.store(du + (rows[:, None] * K + columns[None, :]), rounded, (rows < left)[:, None] & mask[None, :])
    if SUMS:
        g = tl.where((rows < left)[:, None], rounded.to(tl.float32), 0.0)  # else it is row
        values = matrix_tile(x, rows, columns, left, K).to(tl.float32)
        if RELU:
            g = relu_grad(g, scale_shift(values, x_affine, K, columns, mask))
        centred = g * (values - tl.load(x_moments + columns, mask, 0.0)[None, :])
        tl.store(partial + tile * K + columns, tl.sum(g, 0), mask)
        tl.store(partial + (tiles + tile) * K + columns, tl.sum(centred, 0), mask)


# ---- the functions of reference.py


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
    """Compute du, dW [N, K, 1, 1] and dγ [N] from ``G`` and ``ΣG``, and the sums [2, K] of the norm in front."""
    outputs, inputs = conv_weight.shape[:2]
    rows, x_relu = x.numel() // inputs, is_relu(x_act)
    sums = moments.new_empty(1, inputs * outputs)
    if rows == 0:
        sums.zero_()
        gram = moments.new_zeros(inputs * (inputs + 1))
    else:
        prologue, precision = prologue_of(x, x_affine, x_relu), float32_precision()
        if gram.numel() == 0:
            gram = gram_of(x, prologue)
        cut = config.weight_gradient(inputs, outputs, x.itemsize)
        tiles = ceil_div(inputs, cut.rows) * ceil_div(outputs, cut.columns)
        parts, rows_per_part = in_parts(rows, cut.depth, tiles, cut.programs * multiprocessors(x.device))
        partial = sums.new_empty(1, parts, sums.shape[1])
        _wgrad_kernel[parts * tiles,](
            grad, x, prologue, partial, rows, inputs, outputs, parts, rows_per_part,
            precision, cut.depth, cut.columns, cut.rows, cut.stages, num_warps=cut.warps,
        )  # fmt: skip
        add_parts(partial, sums)
    w = conv_weight.flatten(1).contiguous()
    d_conv_weight, folded = w.new_empty(outputs, inputs, 1, 1, dtype=torch.float32), torch.empty_like(w)
    grad_weight, slope = (torch.empty_like(sum_grad) for _ in range(2))
    cut = config.finish(inputs, outputs)
    _finish_weights_kernel[ceil_div(outputs, cut.columns),](
        sums, gram, sum_grad, w, moments, weight, d_conv_weight, grad_weight, folded, slope, inputs, outputs,
        float(max(rows, 1)), eps, weight is not None, cut.columns, cut.depth, num_warps=cut.warps,
    )  # fmt: skip
    if not wants_input:
        return grad.new_empty(0), d_conv_weight, grad_weight, moments.new_empty(0)
    du = torch.empty_like(x)
    finish, cut = cut, config.input_gradient(inputs, x.itemsize)
    tiles = ceil_div(rows, cut.rows)
    tile_sums = None if x_moments is None else moments.new_empty(2, tiles, inputs)
    if rows:
        parts = 1 if x.dtype is torch.float32 else 2  # of M in the dtype: rounded once, it would show in the sums of dβ
        mixing, row = w.new_empty(parts, inputs, inputs), slope.new_empty(inputs)
        _finish_mixing_kernel[ceil_div(inputs, finish.rows),](
            gram, sum_grad, w, slope, folded, mixing, row, inputs, outputs, float(rows), parts, finish.depth,
            finish.depth, finish.rows, num_warps=finish.warps,
        )  # fmt: skip
        if precision == "tf32":  # in three products, as good as float32: M was made of a Wa that is not cut off
            precision = "tf32x3"
        _dgrad_kernel[tiles * ceil_div(inputs, cut.columns),](
            grad, x, x_affine, x_moments, prologue, folded, mixing, row, du, tile_sums, rows, inputs, outputs, tiles,
            tile_sums is not None, x_relu, parts,
            precision, cut.rows, cut.columns, cut.depth, cut.stages, num_warps=cut.warps,
        )  # fmt: skip
    # of thousands of tiles, which torch's reduction adds with the whole device
    x_sums = moments.new_empty(0) if tile_sums is None else tile_sums.sum(1)
    return du, d_conv_weight, grad_weight, x_sums
