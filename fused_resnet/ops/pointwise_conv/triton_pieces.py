"""The pieces that the kernels of both directions share: the sums over a tile's rows."""

import triton
import triton.language as tl


@triton.jit
def row_pairs(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's rows as pairs that are 8 apart, two times [BLOCK_M / 16, 8, BLOCK_N].

    A thread that holds a product's row holds the one 8 further, too: what adds them needs half of the registers, and
    nothing is shuffled.
    """
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M // 16, 2, 8, BLOCK_N)), (0, 2, 3, 1)))


@triton.jit
def column_sums(pairs):
    """The sums of what :func:`row_pairs` gives, over the rows."""
    return tl.sum(tl.sum(pairs, 0), 0)
