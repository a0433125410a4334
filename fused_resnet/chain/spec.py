"""What a chain is made of, and the order in which its tensors are handed around.

A chain's structure is built from nested plain tuples, so that ``torch.compile`` can follow how it is read from modules
and a traced program can print it into its graph.
"""

import ast
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops.activation import NONE, RELU, Act

Pair = tuple[int, int]
Sizes = tuple[int, ...]  # one of each spatial dimension

IDENTITY = "identity"

T = TypeVar("T")


class Conv(NamedTuple):
    """The geometry of a convolution with zero padding, over sequences, images or volumes."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    bias: bool


class Unit(NamedTuple):
    """``conv → batch norm → act``; without ``conv`` the norm reads the unit's input itself.

    ``group`` names the process group whose batches are normalised together; None where this process has its own.
    """

    conv: Conv | None
    weight: bool
    bias: bool
    batch_stats: bool
    group: str | None
    eps: float
    act: Act


class Pool(NamedTuple):
    """The geometry of a 2-d max pool."""

    kernel_size: Pair
    stride: Pair
    padding: Pair


class Options(NamedTuple):
    """What :func:`fused_resnet.fuse` was asked for.

    ``engine`` is a name, or ``"auto"``; ``memory`` is ``"fast"``, or ``"lean"`` to keep less where that costs time.
    """

    engine: str
    memory: str


class Padded(NamedTuple):
    """A shortcut without parameters: every ``stride``-th pixel, between channels of zeros.

    Option A of He et al. 2015, section 3.3.
    """

    stride: Pair
    before: int
    after: int

    def apply(self, source: Tensor) -> Tensor:
        """Return what it adds [N, before + C + after, H', W'], in stock torch."""
        return F.pad(strided(source, self.stride), (0, 0, 0, 0, self.before, self.after))


def strided(x: Tensor, strides: Sizes) -> Tensor:
    """Return a view of every so manyth pixel."""
    if all(n == 1 for n in strides):
        return x
    index: Any = (..., *(slice(None, None, n) for n in strides))
    return x[index]


def convolve(conv: Conv, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """Return the convolution of ``x``, whose dtype the weight has."""
    stride, padding, dilation, groups, _ = conv
    if bias is not None:
        bias = bias.to(x.dtype)
    y: Tensor = _CONVOLUTIONS[x.dim()](x, weight, bias, stride, padding, dilation, groups)
    return y


_CONVOLUTIONS: dict[int, Any] = {3: torch.conv1d, 4: torch.conv2d, 5: torch.conv3d}
NOT_PADDED = Padded((1, 1), 0, 0)


@dataclass(frozen=True)
class Block:
    """A row of units, and what is at its end.

    Attributes
    ----------
    units
        The main path, in order.  With a shortcut, the last unit's activation comes after the add.
    shortcut
        None, :data:`IDENTITY`, :class:`Padded`, or the unit of a projection (conv → batch norm, no activation).
    pool
        A max pool behind the last unit, or None.
    """

    units: tuple[Unit, ...]
    shortcut: Unit | Padded | str | None
    pool: Pool | None

    @functools.cached_property
    def all_units(self) -> tuple[Unit, ...]:
        """The main path, and the projection behind it."""
        return (*self.units, self.shortcut) if isinstance(self.shortcut, Unit) else self.units

    @functools.cached_property
    def synchronized(self) -> bool:
        """Whether any unit shares its statistics with other processes."""
        return any(unit.group is not None for unit in self.all_units)

    @functools.cached_property
    def padded(self) -> Padded:
        """The shortcut's padding; :data:`NOT_PADDED` for every other kind."""
        return self.shortcut if isinstance(self.shortcut, Padded) else NOT_PADDED

    def pixels(self, source: Tensor) -> Tensor:
        """Return a view of the pixels that a padded shortcut, or one with a 1×1 convolution, takes from its source."""
        projection = isinstance(self.shortcut, Unit) and self.shortcut.conv
        return strided(source, projection.stride if projection else self.padded.stride)

    @functools.cached_property
    def masks_by_output(self) -> bool:
        """Whether backward takes the last ReLU's mask from the block's output: behind an add ``y`` alone can't say."""
        return self.shortcut is not None and self.units[-1].act == RELU

    @functools.cached_property
    def remakes_sum(self) -> bool:
        """Whether backward adds the shortcut once more: what the last activation read is not in what it gave."""
        return self.shortcut is not None and self.units[-1].act not in (NONE, RELU)


@dataclass(frozen=True)
class Chain:
    """What a chain computes: its blocks one behind the other; ``options`` are nothing to that, but to how it is run."""

    blocks: tuple[Block, ...]
    options: Options

    @functools.cached_property
    def units(self) -> tuple[Unit, ...]:
        """The units of all blocks, in the order in which their tensors are handed around."""
        return tuple(unit for block in self.blocks for unit in block.all_units)

    @functools.cached_property
    def present(self) -> tuple[tuple[bool, bool, bool, bool], ...]:
        """Which of its :class:`Parameters` every unit has."""
        return tuple(
            (unit.conv is not None, unit.conv is not None and unit.conv.bias, unit.weight, unit.bias)
            for unit in self.units
        )

    @functools.cached_property
    def masks_by_output(self) -> bool:
        """Whether backward needs the chain's output."""
        return self.blocks[-1].masks_by_output

    def by_block(self, by_unit: Sequence[T]) -> list[Sequence[T]]:
        """Group what there is one of for each unit by block."""
        return [by_unit[units] for units in self._units_of_blocks]

    @functools.cached_property
    def _units_of_blocks(self) -> list[slice]:
        ends = itertools.accumulate((len(block.all_units) for block in self.blocks), initial=0)
        return [slice(*bounds) for bounds in itertools.pairwise(ends)]


@functools.cache
def make_chain(signature: tuple[Any, ...]) -> Chain:
    """Name the parts of a chain given as nested plain tuples, which a traced program can build and print.

    ``eps`` and an activation's constants are there as ``float.hex`` writes them: exact, and constants also where floats
    are traced as symbols.
    """
    blocks, options = signature
    return Chain(tuple(itertools.starmap(_make_block, blocks)), Options(*options))


def _make_block(units: tuple[Any, ...], shortcut: Any, pool: Any) -> Block:
    if isinstance(shortcut, tuple):
        shortcut = _make_unit(shortcut) if is_projection(shortcut) else Padded(*shortcut)
    return Block(tuple(map(_make_unit, units)), shortcut, Pool(*pool) if pool else None)


def is_projection(shortcut: Any) -> bool:
    """Whether a signature's shortcut is a projection: autocast casts what its convolution reads, not what is added."""
    return isinstance(shortcut, tuple) and len(shortcut) == len(Unit._fields)


def _make_unit(signature: tuple[Any, ...]) -> Unit:
    conv, weight, bias, batch_stats, group, eps, act = signature
    return Unit(
        Conv(*conv) if conv else None, weight, bias, batch_stats, group, float.fromhex(eps), act_of_signature(act)
    )


def act_signature(act: Act) -> tuple[int, str, str]:
    """Return an activation as a chain's signature has it."""
    return int(act.kind), float(act.alpha).hex(), float(act.beta).hex()


def act_of_signature(signature: tuple[int, str, str]) -> Act:
    """Return what :func:`act_signature` was given."""
    kind, alpha, beta = signature
    return Act(kind, float.fromhex(alpha), float.fromhex(beta))


@functools.cache
def parse_chain(signature: str) -> Chain:
    """Read a chain from the ``repr`` of its signature."""
    return make_chain(ast.literal_eval(signature))


class Parameters(NamedTuple):
    """What a unit has one of for each parameter: the parameters, their gradients, or whether those are wanted."""

    conv_weight: Any
    conv_bias: Any
    weight: Any
    bias: Any


class Saved(NamedTuple):
    """What a unit keeps for backward.

    ``y`` is None where the unit has no conv; where backward does without, it is of one dimension: what the engine keeps
    instead.  ``conv_weight`` is None unless it was cast.
    """

    y: Tensor | None
    affine: Tensor
    conv_weight: Tensor | None

    @property
    def lacks_y(self) -> bool:
        """Whether backward does without ``y``; that of a process without a batch is empty, too."""
        return self.y is not None and self.y.dim() == 1


class Kept(NamedTuple):
    """What a chain keeps for backward, besides its input, its output and its parameters.

    ``units`` has one for each unit, ``indices`` those of the pools, ``outputs`` those of all blocks but the last.
    """

    units: list[Saved]
    indices: list[Tensor]
    outputs: list[Tensor]


def split_parameters(chain: Chain, flat: Iterable[Any]) -> list[Parameters]:
    """Group a flat list, one item for each parameter that the units have, by unit."""
    items = iter(flat)
    return [Parameters(*[next(items) if present else None for present in unit]) for unit in chain.present]


def split_kept(chain: Chain, x: Tensor, parameters: list[Parameters], flat: Iterable[Tensor]) -> Kept:
    """Sort the flat list of tensors that a chain keeps."""
    items = iter(flat)
    units = [
        Saved(
            next(items) if unit.conv else None,
            next(items),
            next(items) if unit.conv and p.conv_weight.dtype != x.dtype else None,
        )
        for unit, p in zip(chain.units, parameters, strict=True)
    ]
    indices = [next(items) for block in chain.blocks if block.pool]
    return Kept(units, indices, list(items))


def wants_input(chain: Chain, needs_grad: Sequence[bool], shortcut: Tensor | None) -> list[bool]:
    """Return for every unit whether anything in front of it wants a gradient; ``needs_grad`` as in a chain's backward.

    A separate ``shortcut`` is that of the first block.
    """
    wants_x, wants_shortcut, *wants = needs_grad
    wanted: list[bool] = []
    wants_source = wants_x if shortcut is None else wants_shortcut
    for block, units in zip(chain.blocks, chain.by_block(split_parameters(chain, wants)), strict=True):
        in_front = wants_x
        for unit in units[: len(block.units)]:
            wanted.append(in_front)
            in_front = in_front or any(unit)
        if isinstance(block.shortcut, Unit):
            wanted.append(wants_source)
            in_front = in_front or any(units[-1])
        wants_x = wants_source = in_front or wants_source
    return wanted
