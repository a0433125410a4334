"""A 1×1 convolution and its batch norm on a GPU, forward: the reference's function as Triton kernels.

Activations are channels_last, i.e. row-major matrices of M = N·H·W rows, with K channels before the convolution and N
behind it; s is the size of an element.  ``y`` lives in registers only, and its statistics are made without it: of the
Gram matrix ``vᵀv`` of ``triton_gram.py``, a quarter of the product's FLOP, which backward needs, too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.activation import Act
from fused_resnet.ops.launch import ceil_div, float32_precision
from fused_resnet.ops.pointwise_conv_norm import config
from fused_resnet.ops.pointwise_conv_norm.triton_gram import (
    centred_tile,
    covariance_tile,
    gram_of,
    is_relu,
    missed_mean,
    prologue_of,
)
from fused_resnet.ops.triton_activation import relu
from fused_resnet.ops.triton_pieces import matrix_tile, scale_shift, store_affine, weight_tile

__all__ = ["pointwise_conv_norm_act"]


# ---- kernels


@triton.jit(do_not_specialize=["count", "eps"])
def _gram_stats_kernel(
    gram,
    prologue,
    w,
    weight,
    bias,
    moments,
    affine,
    centred_affine,
    K,
    N,
    count,
    eps,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``mean = W·c + W·(Σv/m)`` and ``var = diag(W·S·Wᵀ)/m`` of ``y``, N outputs at a time; the affine of ``y``, and
    that of ``v·Wᵀ``, whose mean lacks ``W·c``.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = outputs < N
    offset = tl.zeros((BLOCK_N,), tl.float64)
    shift = tl.zeros((BLOCK_N,), tl.float64)
    for k in range(0, K, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        tile = matrix_tile(w, outputs, inputs, N, K).to(tl.float64)
        offset += tl.sum(missed_mean(gram, inputs, K, count).to(tl.float64)[None, :] * tile, 1)
        shift += tl.sum(tl.load(prologue + 3 * K + inputs, inputs < K, 0.0).to(tl.float64)[None, :] * tile, 1)
    squares = tl.zeros((BLOCK_N,), tl.float64)
    for k in range(0, K, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for j in range(0, K, BLOCK_K):
            others = j + tl.arange(0, BLOCK_K)
            tile = matrix_tile(w, outputs, others, N, K).to(tl.float32)
            product = tl.dot(tile, covariance_tile(gram, others, inputs, K, count), product, input_precision="ieee")
        squares += tl.sum(product.to(tl.float64) * matrix_tile(w, outputs, inputs, N, K).to(tl.float64), 1)
    var = tl.maximum(squares / count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mean, centred_mean, rounded_var = (shift + offset).to(tl.float32), offset.to(tl.float32), var.to(tl.float32)
    tl.store(moments + outputs, mean, there)
    tl.store(moments + N + outputs, rounded_var, there)
    tl.store(moments + 2 * N + outputs, (var * (count / tl.maximum(count - 1.0, 1.0))).to(tl.float32), there)
    store_affine(affine, mean, rounded_var, weight, bias, N, outputs, there, eps, WEIGHT, BIAS)
    store_affine(centred_affine, centred_mean, rounded_var, weight, bias, N, outputs, there, eps, WEIGHT, BIAS)


@triton.jit
def _add_product(y, x, prologue, w, rows, end, k, columns, K, N, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """``y + v·Wᵀ`` of BLOCK_K inputs from the k-th on."""
    inputs = k + tl.arange(0, BLOCK_K)
    v = centred_tile(x, prologue, rows, end, inputs, K)
    return tl.dot(v, weight_tile(w, inputs, columns, K, N), y, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M"])
def _fprop_act_kernel(
    x,
    prologue,
    w,
    affine,
    residual,
    residual_affine,
    z,
    M,
    K,
    N,
    RESIDUAL: tl.constexpr,
    RESIDUAL_AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``z = act(a·(v·Wᵀ) + b + R)``, R = 0, residual, or ``a_r·residual + b_r``.

    Bytes: s an element of x, of z and of the residual.  A program makes ``v`` once for all outputs of its rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if ONE_STEP:
        inputs = tl.arange(0, BLOCK_K)
        v = centred_tile(x, prologue, rows, M, inputs, K)
    for n in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        columns = n + tl.arange(0, BLOCK_N)
        mask = columns < N
        if ONE_STEP:
            value = tl.dot(v, weight_tile(w, inputs, columns, K, N), input_precision=PRECISION)
        else:
            value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                value = _add_product(value, x, prologue, w, rows, M, k, columns, K, N, PRECISION, BLOCK_K)
        value = scale_shift(value, affine, N, columns, mask)
        at = rows[:, None] * N + columns[None, :]
        inside = (rows < M)[:, None] & mask[None, :]
        if RESIDUAL:
            side = tl.load(residual + at, inside, 0.0).to(tl.float32)
            if RESIDUAL_AFFINE:
                side = scale_shift(side, residual_affine, N, columns, mask)
            value += side
        if RELU:
            value = relu(value)
        tl.store(z + at, value.to(z.dtype.element_ty), inside)


# ---- the functions of reference.py


def pointwise_conv_norm_act(
    x: Tensor,
    x_affine: Tensor | None,
    x_act: Act,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    act: Act,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``z = act(a·(u·Wᵀ) + b + R)``, moments [3, N], affine [2, N], and ``vᵀv`` and ``Σv``, gram [K·K + K]."""
    outputs, inputs = conv_weight.shape[:2]
    x_relu, z_relu = is_relu(x_act), is_relu(act)
    z = torch.empty(
        (x.shape[0], outputs, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    moments, affine, centred = (x.new_empty(n, outputs, dtype=torch.float32) for n in (3, 2, 2))
    if x.numel() == 0:
        return z, moments.fill_(torch.nan), affine.fill_(torch.nan), moments.new_zeros(inputs * (inputs + 1))
    rows = x.numel() // inputs
    w = conv_weight.flatten(1).contiguous()
    prologue, precision = prologue_of(x, x_affine, x_relu), float32_precision()
    gram = gram_of(x, prologue)
    cut = config.finish(inputs, outputs)
    _gram_stats_kernel[ceil_div(outputs, cut.columns),](
        gram, prologue, w, weight, bias, moments, affine, centred, inputs, outputs, float(rows), eps,
        weight is not None, bias is not None, cut.columns, cut.depth, num_warps=cut.warps,
    )  # fmt: skip
    cut = config.apply(inputs, outputs, x.itemsize, residual_affine is not None)
    _fprop_act_kernel[ceil_div(rows, cut.rows),](
        x, prologue, w, centred, residual, residual_affine, z, rows, inputs, outputs,
        residual is not None, residual_affine is not None, z_relu,
        precision, cut.rows, cut.columns, cut.depth, inputs <= cut.depth, cut.stages,
        num_warps=cut.warps, maxnreg=cut.registers,
    )  # fmt: skip
    return z, moments, affine, gram
