"""What must be moved and computed in a training step, by scheme.

This package's schemes, those of `FUSINGS`, are traced (`fused_resnet.surgery.steps`): what the engine that serves here
does, kernel by kernel. Stock's and the compiler's are counted from shapes. A tensor that a kernel reads or writes
counts once for each kernel, in full; what a cache saves is not seen. Here ``x`` is the input of a convolution, ``y``
its raw output, ``z`` an activation, ``g`` a gradient, ``r`` a shortcut. A convolution costs 2 · (elements of y) ·
(weights of one output) FLOP, its dgrad and its wgrad as much again:

    fprop: x + y          dgrad: g + x (not for the first layer)          wgrad: x + g

The passes over tensors of the size of ``y`` around a convolution (`PASSES`):

=========  =======================================  ==========================================================
unit       forward                                  backward
=========  =======================================  ==========================================================
eager      statistics 1, normalise 2, ReLU 2        ReLU 3; reduce g, y; apply g, y → dy
  end      the same, and add 3                      the same
  dual     the same, and the projection's norm 3    the same, and the projection's norm 5
pointwise  statistics 1; y → z                      reduce g, z, y; apply g, z, y → dy
  end      statistics 1; y, r → z                   g, z → G; reduce G, y; apply G, y → dy
  dual     statistics 2; y, r → z                   g, z → G; reduce G, y, r; apply G, y, r → dy, dr
=========  =======================================  ==========================================================

``inner`` units stand inside a block, ``end`` ones before its add, ``dual`` ones before an add of a projection, whose
own passes they count. A block's input has two readers, so two gradients ``meet``: 3 passes over it in eager, 1 more in
pointwise (inside ``g, z → G``).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.bench.block import RESIDUAL_BLOCKS, BlockShape
from fused_resnet.bench.ceilings import ARITHMETIC_PART, BANDWIDTH_PART, Ceilings
from fused_resnet.bench.peers import FUSINGS
from fused_resnet.surgery import fuse
from fused_resnet.surgery.steps import trace


class Passes(NamedTuple):
    """How many tensors of a unit's size the kernels around its convolution move, and of its block's input."""

    forward: int
    backward: int
    meet: int = 0


# that SGD with momentum moves of a parameter: reads weight, gradient and momentum and writes weight and momentum
OPTIMIZER_BYTES = 5 * 4

# scheme -> role of a unit -> passes
PASSES = {
    "eager": {"inner": Passes(5, 8), "stem": Passes(5, 8), "end": Passes(8, 8, 3), "dual": Passes(11, 13, 3)},
    "pointwise": {"inner": Passes(3, 7), "stem": Passes(3, 7), "end": Passes(4, 8, 1), "dual": Passes(5, 11, 1)},
}

# bytes of the index of a maximum of the stem's pool, which reads z and writes g
INDEX_BYTES = {"eager": 8, "pointwise": 1}

SCHEMES = (*PASSES, *FUSINGS)

# The operation alone, act(batch_norm(x) + shortcut): its fewest passes.  The gradient of every activation, ReLU's mask
# too, can be made of x and r again, so that backward reads r where it would read z: as many passes for all of them.
# Behind an add the schedule moves more than that: dual, 2 passes for a z or v besides x and r; any add of another
# activation than ReLU, 3 passes that make v = a·x + b + r of x and r again, to be read in the place of z.
OPERATION_PASSES = {"none": Passes(3, 5), "residual": Passes(4, 8), "dual": Passes(5, 8)}
# without an activation the gradient of a shortcut that is added as it is is the one that came
LINEAR_PASSES = {**OPERATION_PASSES, "residual": Passes(4, 5)}


@dataclass(frozen=True)
class Layer:
    """A convolution and the batch norm behind it, for one image; sizes in elements.

    Attributes
    ----------
    name, role
        Of the convolution; ``inner``, ``end``, ``dual``, ``projection`` or ``stem``.
    input, output
        What it reads and writes.
    flop
        Of its fprop.
    meets
        The input of its block, where it ends one; else 0.
    pooled
        What the max pool behind it writes, or 0.
    """

    name: str
    role: str
    input: int
    output: int
    flop: float
    meets: int = 0
    pooled: int = 0


@dataclass(frozen=True)
class Shapes:
    """The layers of a network or of a block, and what else costs something, for one image.

    Attributes
    ----------
    layers
        In the order in which they run; the role of a network's first is ``stem``.
    parameters
        How many.
    features
        Elements that the average pool reads, or 0.
    classifier_flop
        Of its fprop.
    """

    layers: tuple[Layer, ...]
    parameters: int
    features: int = 0
    classifier_flop: float = 0


@dataclass(frozen=True)
class Traffic:
    """What a training step costs for one image.

    Attributes
    ----------
    kernels
        Bytes and FLOP of every kernel, or of several alike.
    saved
        Bytes that the forward keeps for the backward.
    """

    kernels: tuple[tuple[float, float], ...]
    saved: float

    @property
    def bytes(self) -> float:
        """Of DRAM traffic."""
        return sum(bytes for bytes, _ in self.kernels)

    @property
    def flop(self) -> float:
        """Floating-point operations."""
        return sum(flop for _, flop in self.kernels)

    def images_per_second(self, ceilings: Ceilings, *, overlap: bool) -> float:
        """Return the speed at `BANDWIDTH_PART` and `ARITHMETIC_PART` of the ceilings.

        With overlap each kernel takes the longer of its two times, without it their sum.
        """
        combine: Callable[[Iterable[float]], float] = max if overlap else sum
        copy, matmul = ceilings.copy * BANDWIDTH_PART, ceilings.matmul * ARITHMETIC_PART
        return 1 / sum(combine((bytes / copy, flop / matmul)) for bytes, flop in self.kernels)


def count(shapes: Shapes, scheme: str, *, element_size: int, batch_size: int) -> Traffic:
    """Count the training step of one image, as stock or a compiler does it.

    Parameters
    ----------
    shapes : Shapes
        From `network_shapes` or `block_shapes`.
    scheme : str
        One of `PASSES`.
    element_size : int
        Bytes of an activation; parameters and their gradients are float32.
    batch_size : int
        Images that share the traffic of the parameters.
    """
    kernels: list[tuple[float, float]] = []
    saved = 0.0
    for layer in shapes.layers:
        x, y = layer.input, layer.output
        kernels += [(x + y, layer.flop), (x + y, layer.flop)]  # fprop, wgrad
        if layer.role == "stem":
            saved += x
        else:
            kernels.append((x + y, layer.flop))  # dgrad
        saved += y
        if layer.role == "projection":
            continue
        passes = PASSES[scheme][layer.role]
        kernels += [(passes.forward * y, 0), (passes.backward * y, 0), (passes.meet * layer.meets, 0)]
        saved += y
        if layer.pooled:
            pooled = layer.pooled * (1 + INDEX_BYTES[scheme] / element_size)
            kernels += [(y + pooled, 0), (y + pooled, 0)]
            saved += pooled
    kernels += [(2 * shapes.features, 0), (0, 3 * shapes.classifier_flop)]  # average pool: reads z, writes g
    bytes = [(element_size * elements, flop) for elements, flop in kernels]
    bytes.append((shapes.parameters * parameter_bytes(element_size) / batch_size, 0))
    return Traffic(tuple(bytes), element_size * saved)


def traced(
    module: nn.Module, shapes: Shapes, scheme: str, *, input_shape: Sequence[int], dtype: torch.dtype, engine: str
) -> Traffic:
    """Trace the training step of one image, as this package does it.

    Parameters
    ----------
    module : nn.Module
        A network or a block; it is fused.
    shapes : Shapes
        Of the same.
    scheme : str
        One of `FUSINGS`.
    input_shape : sequence of int
        Of the module's input, [N, C, H, W]; a block's has a gradient.
    dtype : torch.dtype
        Of the activations: other than float32 by autocast.
    engine : str
        That serves, or as if it did: it need not be possible here.
    """
    batch, element_size = input_shape[0], dtype.itemsize
    fuse(module, **FUSINGS[scheme])  # type: ignore[arg-type]
    is_network = shapes.features > 0
    autocast = None if dtype is torch.float32 else dtype
    chains = trace(module, input_shape, autocast, input_grad=not is_network, engine=engine).values()
    kernels = [
        (step.bytes / batch, step.flop / batch) for steps in chains for step in (*steps.forward, *steps.backward)
    ]
    kernels += [(2 * element_size * shapes.features, 0), (0, 3 * shapes.classifier_flop)]
    # what convolutions read and write of the weights is traced, so are the casts
    kernels.append((OPTIMIZER_BYTES * shapes.parameters / batch, 0))
    image = element_size * shapes.layers[0].input if is_network else 0
    weights = 0 if autocast is None else element_size * sum(p.numel() for p in module.parameters() if p.dim() == 4)
    return Traffic(tuple(kernels), image + (sum(steps.kept for steps in chains) - weights) / batch)


def parameter_bytes(element_size: int) -> int:
    """Return the bytes that a parameter moves in a step.

    Read by fprop and dgrad and written by wgrad; read and written by the cast of weight and of gradient where
    activations are not float32; then SGD.
    """
    casts = 0 if element_size == 4 else 2 * (4 + element_size)
    return 3 * element_size + casts + OPTIMIZER_BYTES


def operation_bytes(elements: int, shortcut: str, element_size: int, *, backward: bool, act: str = "relu") -> int:
    """Return the fewest bytes of ``act(batch_norm(x) + shortcut)``: statistics need a pass of their own."""
    passes = (LINEAR_PASSES if act == "none" else OPERATION_PASSES)[shortcut]
    return (passes.forward + (passes.backward if backward else 0)) * elements * element_size


def network_shapes(model: str, image_size: int) -> Shapes:
    """Return the layers of one of this package's networks; it runs once, without data."""
    with torch.device("meta"):
        network = models.create(model)
        image = torch.empty(1, 3, image_size, image_size)
    return _trace(network, image)


def block_shapes(shape: BlockShape) -> Shapes:
    """Return the layers of a residual block."""
    with torch.device("meta"):
        block = models.create(shape.model).get_submodule(shape.name)
        x = torch.empty(1, *shape.input)
    return _trace(block, x)


def _trace(module: nn.Module, x: Tensor) -> Shapes:
    """Run a module on one image without data and note its convolutions."""
    roles = {name: role for name, child in module.named_modules() for name, role in _roles(name, child)}
    layers: dict[str, Layer] = {}
    inputs: dict[str, int] = {}  # of the blocks
    extra = {"features": 0, "classifier_flop": 0, "pooled": 0}

    def elements(size: torch.Size) -> int:
        return prod(size[1:])

    def note(name: str) -> Callable[..., None]:
        def hook(child: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            read, wrote = elements(args[0].shape), elements(output.shape)
            if isinstance(child, nn.Conv2d):
                flop = 2 * wrote * prod(child.weight.shape[1:])
                layers[name] = Layer(name, roles.get(name, "stem"), read, wrote, flop)
            elif isinstance(child, RESIDUAL_BLOCKS):
                inputs[name] = read
            elif isinstance(child, nn.MaxPool2d):
                extra["pooled"] = wrote
            elif isinstance(child, nn.AdaptiveAvgPool2d):
                extra["features"] = read
            elif isinstance(child, nn.Linear):
                extra["classifier_flop"] = 2 * read * wrote

        return hook

    for name, child in module.named_modules():
        child.register_forward_hook(note(name))
    module(x)

    def complete(layer: Layer) -> Layer:
        block = max((b for b in inputs if layer.name.startswith(f"{b}." if b else "")), key=len, default="")
        return Layer(
            layer.name,
            layer.role,
            layer.input,
            layer.output,
            layer.flop,
            meets=inputs[block] if layer.role in ("end", "dual") else 0,
            pooled=extra["pooled"] if layer.role == "stem" else 0,
        )

    parameters = sum(p.numel() for p in module.parameters())
    return Shapes(tuple(map(complete, layers.values())), parameters, extra["features"], float(extra["classifier_flop"]))


def _roles(name: str, block: nn.Module) -> Iterable[tuple[str, str]]:
    """Yield the convolutions of a block with their roles."""
    if not isinstance(block, RESIDUAL_BLOCKS):
        return
    prefix = f"{name}." if name else ""
    convolutions = [child_name for child_name, child in block.named_modules() if isinstance(child, nn.Conv2d)]
    main = [child_name for child_name in convolutions if not child_name.startswith("downsample")]
    for child_name in convolutions:
        role = "inner" if child_name in main else "projection"
        if child_name == main[-1]:
            role = "end" if len(main) == len(convolutions) else "dual"
        yield prefix + child_name, role
