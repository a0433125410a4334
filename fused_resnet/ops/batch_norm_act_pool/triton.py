"""Batch norm, ReLU and max pool on a GPU: the reference's functions as Triton kernels.

Activations are channels_last, s is the size of an element.  A program has some positions and all or some of their
channels; the rows of the input that neighbouring windows share are found in the caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act import config
from fused_resnet.ops.batch_norm_act.triton import split_program

__all__ = ["batch_norm_act_pool", "max_pool_backward"]

POOL_ELEMENTS, POOL_WARPS = 1024, 4


def _cut(channels: int) -> config.Tile:
    """Return a program's tile: half as large where no vector divides the channels, since every element then needs an
    address of its own.
    """
    return config.tile(channels, POOL_ELEMENTS if channels % 8 == 0 else POOL_ELEMENTS // 2, POOL_WARPS)


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
    RELU: tl.constexpr,
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
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            # ties are decided among values as they would have been stored
            value = value.to(z.dtype.element_ty).to(tl.float32)
            wins = exists & ((value > best) | (value != value))
            best = tl.where(wins, value, best)
            place = tl.where(wins, row * KW + column, place)
    at = position[:, None] * C + columns[None, :]
    exists = inside[:, None] & mask[None, :]
    tl.store(z + at, best.to(z.dtype.element_ty), exists)
    tl.store(index + at, place.to(tl.uint8), exists)


@triton.jit(do_not_specialize=["cells", "H", "W", "OH", "OW", "CH", "CW"])
def _pool_backward_kernel(
    grad,
    index,
    dx,
    cells,
    C,
    H,
    W,
    OH,
    OW,
    CH,
    CW,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``dx = Σ grad`` over the windows whose maximum the element is: it gathers from the few that it lies in, so that
    no two programs write one element.

    The padded image is cut into cells of SH × SW elements.  Where an element lies in its cell says which windows hold
    it, and at which place: cell (i, j) begins where window (i, j) does.

    Bytes: s an input element, s + 1 an output element (again for each element of a window, from the caches).
    """
    tile, columns, mask = split_program(tl.program_id(0), C, BLOCK_C)
    cell = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = cell < cells
    i, j = (cell // CW) % CH, cell % CW
    image = cell // (CH * CW)
    for down in tl.static_range(SH):
        for along in tl.static_range(SW):
            total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
            for up in tl.static_range((KH - down + SH - 1) // SH):
                for back in tl.static_range((KW - along + SW - 1) // SW):
                    oh, ow = i - up, j - back
                    there = inside & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
                    at = ((image * OH + oh) * OW + ow)[:, None] * C + columns[None, :]
                    exists = there[:, None] & mask[None, :]
                    won = tl.load(index + at, exists, 255).to(tl.int32) == (down + up * SH) * KW + along + back * SW
                    total += tl.where(won, tl.load(grad + at, exists, 0.0).to(tl.float32), 0.0)
            h, w = i * SH + down - PH, j * SW + along - PW
            there = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = ((image * H + h) * W + w)[:, None] * C + columns[None, :]
            tl.store(dx + at, total.to(dx.dtype.element_ty), there[:, None] & mask[None, :])


def batch_norm_act_pool(
    x: Tensor, affine: Tensor, relu: bool, kernel_size: list[int], stride: list[int], padding: list[int]
) -> tuple[Tensor, Tensor]:
    """Compute ``maxpool(act(a·x + b))`` and the one-byte index of every maximum."""
    n, channels, height, width = x.shape
    out_height, out_width = (
        (size + 2 * p - k) // s + 1 for size, k, s, p in zip((height, width), kernel_size, stride, padding, strict=True)
    )
    shape = (n, channels, out_height, out_width)
    z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    index = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    cut = _cut(channels)
    positions = n * out_height * out_width
    if z.numel():
        _pool_kernel[config.ceil_div(positions, cut.rows) * config.ceil_div(channels, cut.channels),](
            x, affine, z, index, positions, channels, height, width, out_height, out_width,
            relu, *kernel_size, *stride, *padding, cut.rows, cut.channels, num_warps=cut.warps,
        )  # fmt: skip
    return z, index


def max_pool_backward(
    grad: Tensor, index: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """Compute the gradient of what was pooled, [N, C, H, W] with ``size`` = (H, W)."""
    n, channels, out_height, out_width = grad.shape
    height, width = size
    dx = torch.empty(
        (n, channels, height, width), dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )
    cut = _cut(channels)
    down, along = (
        config.ceil_div(extent + p, s) for extent, p, s in zip((height, width), padding, stride, strict=True)
    )
    cells = n * down * along
    if dx.numel():
        _pool_backward_kernel[config.ceil_div(cells, cut.rows) * config.ceil_div(channels, cut.channels),](
            grad, index, dx, cells, channels, height, width, out_height, out_width, down, along,
            *kernel_size, *stride, *padding, cut.rows, cut.channels, num_warps=cut.warps,
        )  # fmt: skip
    return dx
