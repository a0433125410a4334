"""A 1×1 convolution and its batch norm on a GPU: the reference's functions as Triton kernels.

Activations are channels_last, i.e. row-major matrices of M = N·H·W rows, with K channels before the convolution and N
behind it; s is the size of an element.  ``y`` lives in registers only, and its statistics are made without it: of the
Gram matrix ``vᵀv``, a quarter of the product's FLOP, which backward needs, too.

Every product is of the *centred* input ``v = u − c``, rounded once, with ``c`` near the mean of ``u``.  So the digits
go to what varies, sums of squares do not cancel, and what ``c`` misses of the mean is corrected exactly, per channel.
Centring costs nothing: ``v = max(a·x + (b − c), −c)``, with −∞ in place of the last −c where there is no ReLU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act.config import ceil_div
from fused_resnet.ops.batch_norm_act.triton import add_parts, relu_grad, scale_shift, split_program, store_affine
from fused_resnet.ops.launch import multiprocessors
from fused_resnet.ops.pointwise_conv.config import in_parts
from fused_resnet.ops.pointwise_conv.triton import float32_precision, matrix_tile, weight_tile
from fused_resnet.ops.pointwise_conv_norm import config

__all__ = ["pointwise_conv_norm_act", "pointwise_conv_norm_backward"]


# ---- the pieces that kernels share


@triton.jit
def _centred(x, prologue, rows, end, columns, K):
    """``v = max(a·x + (b − c), −c)`` in the dtype of x; 0 in rows that are not there and in channels past K."""
    mask = columns < K
    exists = (rows < end)[:, None]
    raw = tl.load(x + (rows[:, None] * K + columns[None, :]), exists & mask[None, :], 0.0)
    lowest = tl.load(prologue + 2 * K + columns, mask, 0.0)
    v = scale_shift(raw.to(tl.float32), prologue, K, columns, mask)
    v = tl.where(exists, v, 0.0)  # and 0 it stays, since −c <= 0
    return tl.maximum(v, lowest[None, :], propagate_nan=tl.PropagateNan.ALL).to(raw.dtype)


@triton.jit
def _add_product(y, x, prologue, w, rows, end, k, columns, K, N, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """``y + v·Wᵀ`` of BLOCK_K inputs from the k-th on."""
    inputs = k + tl.arange(0, BLOCK_K)
    v = _centred(x, prologue, rows, end, inputs, K)
    return tl.dot(v, weight_tile(w, inputs, columns, K, N), y, input_precision=PRECISION)


# ---- forward


@triton.jit(do_not_specialize=["M"])
def _centre_kernel(
    x,
    x_affine,
    prologue,
    M,
    K,
    EPS: tl.constexpr,
    AFFINE: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``c``, the mean of ``u`` over at most ROWS rows, evenly spaced; prologue [4, K]: a, b − c, −c or −inf, c.

    It is a multiple of the last place that the largest ``u`` has in the dtype, EPS of its power of two.  Then what the
    dtype holds again and again, such as ReLU's 0, it holds as ``v``, too: its rounding would not average out.
    """
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = columns < K
    sample = tl.arange(0, ROWS)
    count = tl.minimum(M, ROWS)
    rows = sample.to(tl.int64) * (M // count)
    exists = (sample < count)[:, None] & mask[None, :]
    u = tl.load(x + rows[:, None] * K + columns[None, :], exists, 0.0).to(tl.float32)
    a, b = tl.full((BLOCK_K,), 1.0, tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    if AFFINE:
        a = tl.load(x_affine + columns, mask, 0.0)
        b = tl.load(x_affine + K + columns, mask, 0.0)
        u = u * a[None, :] + b[None, :]
        if RELU:
            u = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    u = tl.where(exists, u, 0.0)
    c = tl.sum(u, 0) / count.to(tl.float32)
    power = (tl.max(tl.abs(u), 0).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.maximum(power * EPS, 1e-37)
    c = tl.floor(c / unit + 0.5) * unit
    # finite, so that an infinite element gives what stock gives
    c = tl.where(tl.abs(c) < float("inf"), c, 0.0)
    tl.store(prologue + columns, a, mask)
    tl.store(prologue + K + columns, b - c, mask)
    lowest = -c if AFFINE and RELU else tl.full((BLOCK_K,), float("-inf"), tl.float32)
    tl.store(prologue + 2 * K + columns, lowest, mask)
    tl.store(prologue + 3 * K + columns, c, mask)


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _gram_kernel(
    x,
    prologue,
    partial,
    M,
    K,
    parts,
    rows_per_part,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``vᵀv`` and ``Σv`` of each part of the rows; partial [1, parts, K·K + K].

    A tensor core cuts its sums off where an addition rounds: CHUNK steps are added by it, and the chunks as numbers.
    Bytes: s an element of x (again for each tile, from L2).
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(K, BLOCK_K)
    tile, other_tile = pid % tiles, pid // tiles % tiles
    part = (pid // (tiles * tiles)).to(tl.int64)
    begin = part * rows_per_part
    end = tl.minimum(begin + rows_per_part, M)
    inputs = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    others = other_tile * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_M)
    gram = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    total = tl.zeros((16, BLOCK_K), tl.float32)
    chunk = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        left = tl.minimum(end - start, BLOCK_M).to(tl.int32)
        v = _centred(x + start * K, prologue, rows, left, inputs, K)
        other = v if ONE_TILE else _centred(x + start * K, prologue, rows, left, others, K)
        chunk = tl.dot(tl.trans(v), other, chunk, input_precision=PRECISION)
        total += tl.sum(tl.reshape(v.to(tl.float32), (BLOCK_M // 16, 16, BLOCK_K)), 0)
        if (start - begin) % (CHUNK * BLOCK_M) == (CHUNK - 1) * BLOCK_M:
            gram += chunk
            chunk = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    gram += chunk
    out = partial + part * (K * K + K)
    tl.store(out + inputs[:, None] * K + others[None, :], gram, (inputs < K)[:, None] & (others < K)[None, :])
    tl.store(out + K * K + inputs, tl.sum(total, 0), (inputs < K) & (other_tile == 0))


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
        offset += tl.sum(_missed(gram, inputs, K, count).to(tl.float64)[None, :] * tile, 1)
        shift += tl.sum(tl.load(prologue + 3 * K + inputs, inputs < K, 0.0).to(tl.float64)[None, :] * tile, 1)
    squares = tl.zeros((BLOCK_N,), tl.float64)
    for k in range(0, K, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for j in range(0, K, BLOCK_K):
            others = j + tl.arange(0, BLOCK_K)
            tile = matrix_tile(w, outputs, others, N, K).to(tl.float32)
            product = tl.dot(tile, _covariance(gram, others, inputs, K, count), product, input_precision="ieee")
        squares += tl.sum(product.to(tl.float64) * matrix_tile(w, outputs, inputs, N, K).to(tl.float64), 1)
    var = tl.maximum(squares / count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mean, centred_mean, rounded_var = (shift + offset).to(tl.float32), offset.to(tl.float32), var.to(tl.float32)
    tl.store(moments + outputs, mean, there)
    tl.store(moments + N + outputs, rounded_var, there)
    tl.store(moments + 2 * N + outputs, (var * (count / tl.maximum(count - 1.0, 1.0))).to(tl.float32), there)
    store_affine(affine, mean, rounded_var, weight, bias, N, outputs, there, eps, WEIGHT, BIAS)
    store_affine(centred_affine, centred_mean, rounded_var, weight, bias, N, outputs, there, eps, WEIGHT, BIAS)


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
        v = _centred(x, prologue, rows, M, inputs, K)
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
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(z + at, value.to(z.dtype.element_ty), inside)


# ---- backward


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
        v = _centred(x + start * K, prologue, rows, left, inputs, K)
        g = matrix_tile(grad + start * N, rows, outputs, left, N)
        product = tl.dot(tl.trans(v), g, product, input_precision=PRECISION)
    inside = (inputs < K)[:, None] & (outputs < N)[None, :]
    tl.store(partial + part * (K * N) + inputs[:, None] * N + outputs[None, :], product, inside)


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
        v = _centred(x, prologue, rows, left, inputs, K)
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
            covariance = _covariance(gram, others, inputs, K, count)
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
        missed = _missed(gram, inputs, K, count)
        for part in tl.static_range(PARTS):
            rounded = rest.to(mixing.dtype.element_ty)
            at = part * K * K + inputs[:, None] * K + columns[None, :]
            tl.store(mixing + at, rounded, (inputs < K)[:, None] & mask[None, :])
            total -= tl.sum(missed[:, None] * rounded.to(tl.float32), 0).to(tl.float64)
            rest -= rounded.to(tl.float32)
    tl.store(row + columns, total.to(tl.float32), mask)


@triton.jit
def _missed(gram, inputs, K, count):
    """What c missed of the mean of ``u``: ``Σv/m``."""
    return tl.load(gram + K * K + inputs, inputs < K, 0.0) / count


@triton.jit
def _covariance(gram, others, inputs, K, count):
    """``S = vᵀv − m·(Σv/m)ᵀ(Σv/m)``, a tile [others, inputs]."""
    missed, other_missed = _missed(gram, inputs, K, count), _missed(gram, others, K, count)
    return matrix_tile(gram, others, inputs, K, K) - count * other_missed[:, None] * missed[None, :]


@triton.jit
def _weight_sums(sums, gram, g, inputs, outputs, K, N, count):
    """``R = Gᵀv − ΣG·(Σv/m)``, a tile [outputs, inputs]; g is ``ΣG``."""
    return tl.trans(matrix_tile(sums, inputs, outputs, K, N)) - g[:, None] * _missed(gram, inputs, K, count)[None, :]


# ---- the functions of reference.py


def pointwise_conv_norm_act(
    x: Tensor,
    x_affine: Tensor | None,
    x_relu: bool,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_affine: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``z = act(a·(u·Wᵀ) + b + R)``, moments [3, N], affine [2, N], and ``vᵀv`` and ``Σv``, gram [K·K + K]."""
    outputs, inputs = conv_weight.shape[:2]
    z = torch.empty(
        (x.shape[0], outputs, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    moments, affine, centred = (x.new_empty(n, outputs, dtype=torch.float32) for n in (3, 2, 2))
    if x.numel() == 0:
        return z, moments.fill_(torch.nan), affine.fill_(torch.nan), moments.new_zeros(inputs * (inputs + 1))
    rows = x.numel() // inputs
    w = conv_weight.flatten(1).contiguous()
    prologue, precision = _prologue(x, x_affine, x_relu), float32_precision()
    gram = _gram(x, prologue)
    cut = config.finish(inputs, outputs)
    _gram_stats_kernel[ceil_div(outputs, cut.columns),](
        gram, prologue, w, weight, bias, moments, affine, centred, inputs, outputs, float(rows), eps,
        weight is not None, bias is not None, cut.columns, cut.depth, num_warps=cut.warps,
    )  # fmt: skip
    cut = config.apply(inputs, outputs, x.itemsize, residual_affine is not None)
    _fprop_act_kernel[ceil_div(rows, cut.rows),](
        x, prologue, w, centred, residual, residual_affine, z, rows, inputs, outputs,
        residual is not None, residual_affine is not None, relu,
        precision, cut.rows, cut.columns, cut.depth, inputs <= cut.depth, cut.stages,
        num_warps=cut.warps, maxnreg=cut.registers,
    )  # fmt: skip
    return z, moments, affine, gram


def pointwise_conv_norm_backward(
    grad: Tensor,
    sum_grad: Tensor,
    x: Tensor,
    x_affine: Tensor | None,
    x_moments: Tensor | None,
    x_relu: bool,
    conv_weight: Tensor,
    moments: Tensor,
    gram: Tensor,
    weight: Tensor | None,
    eps: float,
    wants_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute du, dW [N, K, 1, 1] and dγ [N] from ``G`` and ``ΣG``, and the sums [2, K] of the norm in front."""
    outputs, inputs = conv_weight.shape[:2]
    rows = x.numel() // inputs
    sums = moments.new_empty(1, inputs * outputs)
    if rows == 0:
        sums.zero_()
        gram = moments.new_zeros(inputs * (inputs + 1))
    else:
        prologue, precision = _prologue(x, x_affine, x_relu), float32_precision()
        if gram.numel() == 0:
            gram = _gram(x, prologue)
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


def _gram(x: Tensor, prologue: Tensor) -> Tensor:
    """Return ``vᵀv`` and ``Σv``, [K·K + K]."""
    inputs = x.shape[1]
    gram = prologue.new_empty(1, inputs * (inputs + 1))
    rows = x.numel() // inputs
    cut = config.gram(inputs, x.itemsize)
    tiles = ceil_div(inputs, cut.columns)
    parts, rows_per_part = in_parts(rows, cut.depth, tiles * tiles, cut.programs * multiprocessors(x.device))
    partial = gram.new_empty(1, parts, gram.shape[1])
    _gram_kernel[parts * tiles * tiles,](
        x, prologue, partial, rows, inputs, parts, rows_per_part,
        float32_precision(), cut.depth, cut.columns, tiles == 1, config.GRAM_CHUNK, cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    add_parts(partial, gram)
    return gram[0]


def _prologue(x: Tensor, x_affine: Tensor | None, x_relu: bool) -> Tensor:
    """Return what makes ``v`` of x, and the centre: [4, K]."""
    inputs = x.shape[1]
    prologue = x.new_empty(4, inputs, dtype=torch.float32)
    _centre_kernel[ceil_div(inputs, config.SAMPLED_CHANNELS),](
        x, x_affine, prologue, x.numel() // inputs, inputs, torch.finfo(x.dtype).eps, x_affine is not None, x_relu,
        config.SAMPLED_ROWS, config.SAMPLED_CHANNELS,
    )  # fmt: skip
    return prologue
