"""Batch norm, activation and max pool on a GPU, forward: the reference's function as a Triton kernel.

Activations are channels_last, s is the size of an element.  A program has some positions and all or some of their
channels; the rows of the input that neighbouring windows share are found in the caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act_pool import config
from fused_resnet.ops.launch import ceil_div
from fused_resnet.ops.triton_activation import act
from fused_resnet.ops.triton_pieces import split_program

__all__ = ["batch_norm_act_pool"]


# ---- kernels


@triton.jit(do_not_specialize=["positions", "H", "W", "OH", "OW"])
def _pool_kernel(
    x,
    affine,
    z,
    index,
    positions,
    C,
    H,
    W,
    OH,
    OW,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``z = maxpool(act(a·x + b))``, index = the maximum's place in its window, ``row·KW + column``.

    Bytes: s an input element (again for each window, from the caches), s + 1 an output element.
    """
    tile, columns, mask = split_program(tl.program_id(0), C, BLOCK_C)
    position = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = position < positions
    top = (position // OW) % OH * SH - PH
    left = position % OW * SW - PW
    image = position // (OH * OW) * H
    a = tl.load(affine + columns, mask, 0.0)
    b = tl.load(affine + C + columns, mask, 0.0)
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    # where every element is -inf the first of the window that lies in the image wins
    first = tl.maximum(-top, 0) * KW + tl.maximum(-left, 0)
    place = tl.broadcast_to(first.to(tl.int32)[:, None], (BLOCK_P, BLOCK_C))
    for row in tl.static_range(KH):
        for column in tl.static_range(KW):
            h, w = top + row, left + column
            there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = ((image + h) * W + w)[:, None] * C + columns[None, :]
            exists = there[:, None] & mask[None, :]
            value = tl.load(x + at, exists, 0.0).to(tl.float32) * a[None, :] + b[None, :]
            value = act(value, ACT, ALPHA, BETA)
            # ties are decided among values as they would have been stored
            value = value.to(z.dtype.element_ty).to(tl.float32)
            wins = exists & ((value > best) | (value != value))
            best = tl.where(wins, value, best)
            place = tl.where(wins, row * KW + column, place)
    at = position[:, None] * C + columns[None, :]
    exists = inside[:, None] & mask[None, :]
    tl.store(z + at, best.to(z.dtype.element_ty), exists)
    tl.store(index + at, place.to(tl.uint8), exists)


# ---- the functions of reference.py


def batch_norm_act_pool(
    x: Tensor,
    affine: Tensor,
    act: int,
    alpha: float,
    beta: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute ``maxpool(act(a·x + b))`` and the one-byte index of every maximum."""
    n, channels, height, width = x.shape
    out_height, out_width = (
        (size + 2 * p - k) // s + 1 for size, k, s, p in zip((height, width), kernel_size, stride, padding, strict=True)
    )
    shape = (n, channels, out_height, out_width)
    z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    index = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    cut = config.tile(channels)
    positions = n * out_height * out_width
    if z.numel():
        _pool_kernel[ceil_div(positions, cut.rows) * ceil_div(channels, cut.channels),](
            x, affine, z, index, positions, channels, height, width, out_height, out_width,
            act, alpha, beta, *kernel_size, *stride, *padding, cut.rows, cut.channels, num_warps=cut.warps,
        )  # fmt: skip
    return z, index
