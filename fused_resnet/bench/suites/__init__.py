"""Which cases are measured; a row comes as soon as it is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fused_resnet.bench.peers import LEAN, LEAN_STAGE, STAGE, TIMM
from fused_resnet.bench.rows import FUSED, STOCK, Row
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.block import measure_block
from fused_resnet.bench.suites.ceilings import measure_ceilings
from fused_resnet.bench.suites.conv import measure_conv
from fused_resnet.bench.suites.model import measure_memory, measure_model, measure_profile
from fused_resnet.bench.suites.op import measure_op
from fused_resnet.bench.suites.pointwise import measure_pointwise
from fused_resnet.bench.suites.roofline import measure_roofline

__all__ = ["SUITES", "Suite"]


@dataclass(frozen=True)
class Suite:
    """A set of cases that are measured alike.

    Attributes
    ----------
    name, title
        What it is called, and what it measures.
    columns
        What its cases are told apart by, each with the width of its widest entry.
    measure
        The rows, each as soon as it is measured.
    contest
        Whether its rows are peers that are timed by turns: a line of the table each. Otherwise the peers are columns.
    limited
        Whether its rows need the ceilings.
    without
        Peers that it does not have.
    group
        What its cases are told apart by in a line of its own above them, where they are; or nothing.
    counts_blocks
        Whether it goes through the blocks of this package's networks, and knows no others.
    """

    name: str
    title: str
    columns: Mapping[str, int]
    measure: Callable[[Settings], Iterator[Row]]
    contest: bool = True
    limited: bool = False
    without: tuple[str, ...] = ()
    group: str = ""
    counts_blocks: bool = False


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "ceilings",
            "a large copy (bytes read and written) and a large matrix product: what limits are made of",
            {"ceiling": 8, "dtype": 5},
            measure_ceilings,
            contest=False,
            without=(STOCK, FUSED),
        ),
        Suite(
            "conv",
            "every distinct convolution as PyTorch runs it, and the product of matrices that a 1x1 is; the limit is "
            "its fewest bytes and its arithmetic",
            {"input": 11, "kernel": 10, "dtype": 5, "pass": 7},
            measure_conv,
            contest=False,
            limited=True,
            counts_blocks=True,
        ),
        Suite(
            "pointwise",
            "1x1 convolutions with their batch norms, part by part: torch has PyTorch's convolutions between the "
            "engine's norm kernels, fused the engine's operations (triton has products of its own), matmul the "
            "products alone; the limit is the bytes and the arithmetic of fused",
            {"shape": 14, "dtype": 5, "step": 12},
            measure_pointwise,
            limited=True,
            counts_blocks=True,
        ),
        Suite(
            "op",
            "act(batch_norm(x) + shortcut) at the shapes of a ResNet-50, relu where no other is named; the limit is "
            "its fewest bytes at the copy's speed",
            {"shape": 10, "shortcut": 8, "dtype": 5, "pass": 7},
            measure_op,
            limited=True,
            without=(LEAN, STAGE, LEAN_STAGE, TIMM),
            group="act",
        ),
        Suite(
            "block",
            "forward and backward of every distinct residual block; the limit is what the roofline's 'fused' moves "
            "and computes",
            {"model": 9, "block": 8, "input": 10, "dtype": 5},
            measure_block,
            limited=True,
            without=(STAGE, LEAN_STAGE, TIMM),
            counts_blocks=True,
        ),
        Suite(
            "model",
            "a step of a network: forward, cross entropy, backward, SGD (eval: forward)",
            {"model": 9, "dtype": 5},
            measure_model,
        ),
        Suite(
            "memory",
            "activations that a training step keeps for its backward, on a GPU also its peak",
            {"model": 9, "dtype": 5, "memory": 11},
            measure_memory,
        ),
        Suite(
            "profile",
            "milliseconds of a step by class of kernel (on a CPU: of operation), from torch's profiler",
            {"model": 9, "dtype": 5, "kernels": 13},
            measure_profile,
            contest=False,
            without=(LEAN, LEAN_STAGE),
        ),
        Suite(
            "roofline",
            "what a training step moves, keeps and can reach: stock and compiled counted from shapes, fused traced; of "
            "a library's network, whose step runs, every kernel is noted",
            {"model": 9, "dtype": 5, "figure": 21},
            measure_roofline,
            contest=False,
            limited=True,
        ),
    )
}
