"""The pieces that the Triton kernels of several folders share."""

import triton
import triton.language as tl


@triton.jit
def split_program(pid, C, BLOCK_C: tl.constexpr):
    """Split a program's number into its tile of rows and its channels; channels run fastest, so that neighbours in
    time are neighbours in memory.
    """
    tiles = tl.cdiv(C, BLOCK_C)
    columns = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // tiles).to(tl.int64), columns, columns < C


@triton.jit
def matrix_tile(matrix, rows, columns, M, N):
    """A tile of a matrix [M, N], 0 outside."""
    return tl.load(matrix + (rows[:, None] * N + columns[None, :]), (rows < M)[:, None] & (columns < N)[None, :], 0.0)


@triton.jit
def weight_tile(w, inputs, columns, K, N):
    """A tile of ``Wᵀ``, w being [N, K]."""
    exists = (columns < N)[:, None] & (inputs < K)[None, :]
    return tl.trans(tl.load(w + columns[:, None] * K + inputs[None, :], exists, 0.0))


@triton.jit
def scale_shift(x, affine, C, columns, mask):
    """``a·x + b``"""
    a = tl.load(affine + columns, mask, 0.0)
    b = tl.load(affine + C + columns, mask, 0.0)
    return x * a[None, :] + b[None, :]


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
