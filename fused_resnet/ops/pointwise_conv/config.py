"""Which 1×1 convolutions carry their batch norm, and how the Triton kernels cut their products into tiles.

The tiles of [M, K] by [K, N] come from counting instructions and bytes and from the ahead-of-time compile for sm_90,
not yet from a GPU.
"""

from typing import NamedTuple

from fused_resnet.engines import GPU_NAMES
from fused_resnet.engines.tuning import tuning
from fused_resnet.ops.batch_norm_act.config import MAX_PARTS
from fused_resnet.ops.launch import ceil_div, power_of_two

# The most inputs for which to do without an output where memory counts for more than time: K·K·N outgrows the passes.
LEAN = 256
# The most channels on the narrow side of a kept output: a product with 256 makes more FLOP of a byte than an H200 can.
MEMORY_BOUND = 128

LEAST = 16  # of each side of a product: smaller ones are padded


def most_channels(engine: str, memory: str, itemsize: int) -> int:
    """Return up to how many channels on its narrow side a 1×1 convolution carries its batch norm: 0 for none."""
    if memory == "lean":
        return LEAN
    return tuning("cuda" if engine in GPU_NAMES else "cpu").most_inputs.get((engine, itemsize), 0)


def makes_sums(engine: str, memory: str, inputs: int, outputs: int, itemsize: int) -> bool:
    """Whether an engine's own product, with a batch norm's sums in it, takes the place of torch's convolution.

    Where products of float32 are made outside the tensor cores, a library's are the better ones.
    """
    most = min(most_channels(engine, memory, itemsize), MEMORY_BOUND)
    return engine == "triton" and itemsize == 2 and min(inputs, outputs) <= most


def makes_weight_gradient(outputs: int) -> bool:
    """Whether a first convolution's weight gradient can be made beside its input gradient, from the same tiles.

    A program sums it up in its registers, of all outputs and its tile of inputs: of 128 outputs 32 KB, of the 128 KB
    that each of two programs has.
    """
    return outputs <= MEMORY_BOUND


class Tile(NamedTuple):
    """How a product is cut, and what a program is: the figures behind ``depth`` are of the program."""

    rows: int
    columns: int
    depth: int  # channels or rows that are summed over in one step
    warps: int
    stages: int
    registers: int | None = None  # at the most, of a thread
    programs: int = 2  # that a multiprocessor holds, where they walk through parts


def side(channels: int, most: int) -> int:
    """Return the side of a tile over ``channels``, at most ``most``."""
    return max(LEAST, min(power_of_two(channels), most))


def in_parts(rows: int, tile_rows: int, tiles: int, programs: int) -> tuple[int, int]:
    """Cut a reduction over ``rows`` whose parts are ``tiles`` programs each; returns (parts, rows of a part).

    There is one wave of ``programs``, and each walks through whole tiles.  The cut depends on the shape and on the
    device's size alone, so that every run adds in the same order.
    """
    wanted = max(1, min(programs // tiles, MAX_PARTS))
    rows_per_part = ceil_div(ceil_div(rows, wanted), tile_rows) * tile_rows
    return ceil_div(rows, rows_per_part), rows_per_part


def statistics(inputs: int, outputs: int, itemsize: int) -> Tile:
    """Return the tile of ``x·Wᵀ`` and its statistics.

    Up to 64 inputs the weights stay in a program, and the rows are what is in flight.  With more they come from L2 for
    each tile again, hence the 128 rows: beside 64 outputs they are a third of what a tile reads.  Eight warps of more
    than 128 registers are one program a multiprocessor; the limit costs no spill.  From 128 outputs on it would, and
    half of the columns would read x twice: one program with three steps of 16 KB in flight.
    """
    if itemsize == 4:  # its products, outside the tensor cores, hold their operands in registers
        return Tile(64, side(outputs, 32), side(inputs, 32), 4, 2)
    if inputs <= 64:
        return Tile(64, side(outputs, 64), side(inputs, 64), 4, 3, programs=3)
    if outputs <= 64:
        return Tile(128, side(outputs, 64), 64, 8, 3, 128)
    return Tile(128, 128, 32, 8, 4, programs=1)


def add_grad(inputs: int, outputs: int, itemsize: int, wants_weight: bool) -> Tile:
    """Return the tile [rows, inputs] of ``d_source + dy·W`` and the outputs of a step.

    Nearly all bytes are those of d_source and x, fetched one or two tiles ahead while up to 128 outputs are one step,
    whose weights stay in a program.  64 rows over four warps are three programs a multiprocessor, and two with more
    outputs, which take 203 registers.

    With the weight gradient all outputs are one step, and eight warps share its sums: 118 registers a thread, two
    programs a multiprocessor, two tiles ahead.  Over four warps they are 225 and spill on sm_80.
    """
    if wants_weight:
        rows, columns, stages = (32, 32, 2) if itemsize == 4 else (64, 64, 3)
        return Tile(rows, side(inputs, columns), side(outputs, MEMORY_BOUND), 8, stages)
    if itemsize == 4:
        return Tile(64, side(inputs, 32), side(outputs, 32), 4, 2)
    if 64 < outputs <= 128:
        return Tile(64, side(inputs, 64), 128, 4, 2, programs=3)
    return Tile(64, side(inputs, 64), side(outputs, 64), 4, 3, programs=3 if outputs <= 64 else 2)
