"""Batch norm, ReLU and max pool on a GPU, backward: the reference's function as a Triton kernel.

Activations are those of ``triton_forward.py``.  A program has some cells of the input and all or some of their
channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act_pool import config
from fused_resnet.ops.launch import ceil_div
from fused_resnet.ops.triton_pieces import split_program

__all__ = ["max_pool_backward"]


# ---- kernels


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


# ---- the functions of reference.py


def max_pool_backward(
    grad: Tensor, index: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """Compute the gradient of what was pooled, [N, C, H, W] with ``size`` = (H, W)."""
    n, channels, out_height, out_width = grad.shape
    height, width = size
    dx = torch.empty(
        (n, channels, height, width), dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )
    cut = config.tile(channels)
    down, along = (ceil_div(extent + p, s) for extent, p, s in zip((height, width), padding, stride, strict=True))
    cells = n * down * along
    if dx.numel():
        _pool_backward_kernel[ceil_div(cells, cut.rows) * ceil_div(channels, cut.channels),](
            grad, index, dx, cells, channels, height, width, out_height, out_width, down, along,
            *kernel_size, *stride, *padding, cut.rows, cut.channels, num_warps=cut.warps,
        )  # fmt: skip
    return dx
