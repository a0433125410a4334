"""How the Triton kernels cut an activation [M, C] (channels_last, M = N·H·W rows) into tiles.

The figures come from counting, not yet from a GPU: 16-byte accesses, enough loads in flight to cover the latency of
HBM (22 KB a multiprocessor on an H200), and registers as the ahead-of-time compile reports them.
"""

import functools
from typing import NamedTuple

from fused_resnet.ops.launch import ceil_div, power_of_two

# Partial results of a channel; more would make their merging cost what the reduction does.
MAX_PARTS = 264
# Waves of programs of a reduction: short of two, the last program to finish is waited for.
PROGRAMS_PER_MULTIPROCESSOR = 4
# The least rows of a tile that a part of a reduction walks through, so that its last step across threads is amortised.
MIN_TILES_PER_PART = 4

MAX_CHANNELS_PER_TILE = 128  # 256 bytes of bfloat16 side by side

PASS_ELEMENTS, PASS_WARPS = 4096, 4
REDUCTION_ELEMENTS, REDUCTION_WARPS = 4096, 8
FLAT_ELEMENTS, FLAT_WARPS = 4096, 4
PARAMETER_CHANNELS = 128  # of one program of a per-channel step


class Tile(NamedTuple):
    """A tile of rows × channels, and the warps of the program that works on it; powers of two."""

    rows: int
    channels: int
    warps: int


class Reduction(NamedTuple):
    """A reduction over rows: its tile, and the parts that the rows are cut into."""

    tile: Tile
    parts: int
    rows_per_part: int


def reduction_stages(itemsize: int) -> int:
    """Return how many tiles of a reduction are in flight, and one: four tensors must fit the 99 KB of an sm_86."""
    return 3 if itemsize == 2 else 2


@functools.cache
def tile(channels: int, elements: int, warps: int) -> Tile:
    """Return the tile of ``elements`` for an activation of ``channels``."""
    columns = min(power_of_two(channels), MAX_CHANNELS_PER_TILE)
    return Tile(elements // columns, columns, warps)


@functools.cache
def reduction(rows: int, channels: int, multiprocessors: int) -> Reduction:
    """Cut a reduction over ``rows``: enough programs for the device, few partial results, whole tiles.

    The cut depends on the shape and on the device's size alone, so that every run adds in the same order.
    """
    cut = tile(channels, REDUCTION_ELEMENTS, REDUCTION_WARPS)
    wanted = ceil_div(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, ceil_div(channels, cut.channels))
    parts = max(1, min(wanted, MAX_PARTS, rows // (MIN_TILES_PER_PART * cut.rows)))
    rows_per_part = ceil_div(ceil_div(rows, parts), cut.rows) * cut.rows
    return Reduction(cut, ceil_div(rows, rows_per_part), rows_per_part)
