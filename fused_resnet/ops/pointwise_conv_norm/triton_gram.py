"""The centred input of a 1×1 convolution and its Gram matrix, which both directions read.

Every product is of the *centred* input ``v = u − c``, rounded once, with ``c`` near the mean of ``u``.  So the digits
go to what varies, sums of squares do not cancel, and what ``c`` misses of the mean is corrected exactly, per channel.
Centring costs nothing: ``v = max(a·x + (b − c), −c)``, with −∞ in place of the last −c where there is no ReLU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.activation import NONE, RELU, Act
from fused_resnet.ops.launch import ceil_div, float32_precision, multiprocessors
from fused_resnet.ops.pointwise_conv.config import in_parts
from fused_resnet.ops.pointwise_conv_norm import config
from fused_resnet.ops.triton_activation import relu
from fused_resnet.ops.triton_merge import add_parts
from fused_resnet.ops.triton_pieces import matrix_tile, scale_shift

# ---- the pieces that kernels share


@triton.jit
def centred_tile(x, prologue, rows, end, columns, K):
    """``v = max(a·x + (b − c), −c)`` in the dtype of x; 0 in rows that are not there and in channels past K."""
    mask = columns < K
    exists = (rows < end)[:, None]
    raw = tl.load(x + (rows[:, None] * K + columns[None, :]), exists & mask[None, :], 0.0)
    lowest = tl.load(prologue + 2 * K + columns, mask, 0.0)
    v = scale_shift(raw.to(tl.float32), prologue, K, columns, mask)
    v = tl.where(exists, v, 0.0)  # and 0 it stays, since −c <= 0
    return tl.maximum(v, lowest[None, :], propagate_nan=tl.PropagateNan.ALL).to(raw.dtype)


@triton.jit
def missed_mean(gram, inputs, K, count):
    """What c missed of the mean of ``u``: ``Σv/m``."""
    return tl.load(gram + K * K + inputs, inputs < K, 0.0) / count


@triton.jit
def covariance_tile(gram, others, inputs, K, count):
    """``S = vᵀv − m·(Σv/m)ᵀ(Σv/m)``, a tile [others, inputs]."""
    missed, other_missed = missed_mean(gram, inputs, K, count), missed_mean(gram, others, K, count)
    return matrix_tile(gram, others, inputs, K, K) - count * other_missed[:, None] * missed[None, :]


# ---- kernels


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
            u = relu(u)
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
        v = centred_tile(x + start * K, prologue, rows, left, inputs, K)
        other = v if ONE_TILE else centred_tile(x + start * K, prologue, rows, left, others, K)
        chunk = tl.dot(tl.trans(v), other, chunk, input_precision=PRECISION)
        total += tl.sum(tl.reshape(v.to(tl.float32), (BLOCK_M // 16, 16, BLOCK_K)), 0)
        if (start - begin) % (CHUNK * BLOCK_M) == (CHUNK - 1) * BLOCK_M:
            gram += chunk
            chunk = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    gram += chunk
    out = partial + part * (K * K + K)
    tl.store(out + inputs[:, None] * K + others[None, :], gram, (inputs < K)[:, None] & (others < K)[None, :])
    tl.store(out + K * K + inputs, tl.sum(total, 0), (inputs < K) & (other_tile == 0))


# ---- their launches


def is_relu(act: Act) -> bool:
    """Return whether an activation is a ReLU; of the others these kernels know none but the identity."""
    if act not in (NONE, RELU):
        raise ValueError(
            f"act must be none or relu beside a product that is not kept, got {Act(*act)}; keep its output"
        )
    return act == RELU


def prologue_of(x: Tensor, x_affine: Tensor | None, x_relu: bool) -> Tensor:
    """Return what makes ``v`` of x, and the centre: [4, K]."""
    inputs = x.shape[1]
    prologue = x.new_empty(4, inputs, dtype=torch.float32)
    _centre_kernel[ceil_div(inputs, config.SAMPLED_CHANNELS),](
        x, x_affine, prologue, x.numel() // inputs, inputs, torch.finfo(x.dtype).eps, x_affine is not None, x_relu,
        config.SAMPLED_ROWS, config.SAMPLED_CHANNELS,
    )  # fmt: skip
    return prologue


def gram_of(x: Tensor, prologue: Tensor) -> Tensor:
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
