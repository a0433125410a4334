"""The pieces that the kernels of both directions, and their launches, share."""

import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.ops.batch_norm_act import config
from fused_resnet.ops.launch import ceil_div


@triton.jit
def in_part(rows, columns, inside, CHANNEL: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a tile is in a tensor of only ``CHANNELS`` channels, from ``CHANNEL`` on: offsets, and what it has.

    Constants, so that the compiler sees which of the tile's 16-byte accesses are whole.
    """
    columns -= CHANNEL
    has = (columns >= 0) & (columns < CHANNELS)
    return rows[:, None] * CHANNELS + columns[None, :], inside & has[None, :]


def part_of_channels(channel: int, part: int, channels: int) -> tuple[int, int]:
    """Return a kernel's PART_CHANNEL and PART_CHANNELS: where a part of the channels is; zeros for all of them."""
    return (channel, part) if part < channels else (0, 0)


def one_pass(x: Tensor) -> tuple[int, int, config.Tile, int]:
    """Return rows, channels, tile and number of programs of one pass over an activation."""
    channels = x.shape[1]
    rows = x.numel() // max(channels, 1)
    cut = config.tile(channels, config.PASS_ELEMENTS, config.PASS_WARPS)
    return rows, channels, cut, ceil_div(rows, cut.rows) * ceil_div(channels, cut.channels)
