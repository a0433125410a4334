"""Where the raw output of a 1×1 convolution is not kept, and how the Triton kernels cut its products into tiles.

To do without it takes two more products of [M, K] and [K, K] for K inputs and M pixels, and K·K·N in between, and saves
passes over [M, N]: it pays where K is small beside what the machine computes while it reads a byte.

The tiles of [M, K] by [K, N] come from counting instructions and bytes and from the ahead-of-time compile for sm_90,
not yet from a GPU.
"""

from fused_resnet.ops.pointwise_conv.config import LEAST, Tile, most_channels, side

GRAM_CHUNK = 16  # steps that a tensor core adds up by itself, 512 rows
SAMPLED_ROWS, SAMPLED_CHANNELS = 512, 16  # of which a program makes the centre: 64 loads a thread, all in flight


def input_depth(inputs: int, itemsize: int) -> int:
    """Return how many inputs are summed over in one step: all where 128 are enough, else 64.

    Of float32 32: its products, outside the tensor cores, hold their operands in registers, and spill with 64.
    """
    if itemsize == 4:
        return side(inputs, 32)
    return side(inputs, 128) if inputs <= 128 else 64


def gram(inputs: int, itemsize: int) -> Tile:
    """Return the tile [inputs, inputs] of ``vᵀv`` and the rows of a step.

    32 rows: 150 registers of four warps, three programs a multiprocessor, for 64 inputs (with 64 rows 223, two); 233 of
    eight, one program with three steps of 8 KB in flight, for 128.
    """
    columns = side(inputs, 256 // itemsize)
    warps, programs = (8, 1) if columns == 128 else (4, 3)
    return Tile(columns, columns, 32, warps, 4, programs=programs)


def apply(inputs: int, outputs: int, itemsize: int, two_branches: bool) -> Tile:
    """Return the tile of the pass that applies.

    128 rows, so that the weights are read from L2 half as often as with 64; 64 columns at a time, whose weights and
    residual are fetched one tile ahead: two programs a multiprocessor, which a third stage makes one.  Eight warps of
    more than 128 registers are one program, too: the limit costs no spill in one step with one branch.  float32 is
    limited, too, because the assembler otherwise aims at 80 and spills.
    """
    depth = input_depth(inputs, itemsize)
    registers = 128 if itemsize == 4 or (inputs <= depth and not two_branches) else None
    return Tile(256 // itemsize, side(outputs, 128 // itemsize), depth, 8, 2, registers)


def weight_gradient(inputs: int, outputs: int, itemsize: int) -> Tile:
    """Return the tile [inputs, outputs] of ``vᵀG`` and the rows of a step.

    All of 128 inputs, so that G is read once.  130 registers of four warps, three programs a multiprocessor, for 64
    inputs; of eight, one program with three steps of 16 KB in flight, for 128 (a limit of 128 spills on sm_80).
    """
    most = 256 // itemsize
    rows = side(inputs, most)
    warps, programs = (8, 1) if rows == 128 else (4, 3)
    return Tile(rows, side(outputs, most), 32, warps, 4, programs=programs)


def input_gradient(inputs: int, itemsize: int) -> Tile:
    """Return the tile [rows, inputs] of ``du`` and the channels of a step.

    128 rows, so that the weights, which every program reads whole, are half of what L2 serves and not two thirds.  With
    the sums of the norm in front 124 registers and 66 KB, two programs a multiprocessor, for 64 inputs.  For 128, a
    step more in flight would take 116 KB or more, which only the GPUs of a data centre have (99 KB elsewhere).
    """
    return Tile(128, side(inputs, 256 // itemsize), 128 // itemsize, 8, 2)


def finish(inputs: int, outputs: int) -> Tile:
    """Return how the sums are finished: outputs of a program, or inputs (rows), and the depth of a step.

    Little work that a launch should not wait for: 16 of either give 16 programs or more where there are 256.  Its
    products are float32's, outside the tensor cores.
    """
    return Tile(LEAST, LEAST, side(min(inputs, outputs), 32), 4, 1)


def pays(engine: str, memory: str, inputs: int, outputs: int, itemsize: int) -> bool:
    """Whether to do without the output of a 1×1 convolution with these channels and activations of this size."""
    return outputs >= 2 * inputs and inputs <= most_channels(engine, memory, itemsize)
