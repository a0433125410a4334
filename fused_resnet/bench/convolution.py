"""The convolutions of a network one by one, as PyTorch runs them: what fused ones have to beat."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fused_resnet import models

FPROP, DGRAD, WGRAD = "fprop", "dgrad", "wgrad"
PASSES = (FPROP, DGRAD, WGRAD)

_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class ConvShape:
    """A convolution and what it reads.

    Attributes
    ----------
    input
        [C, H, W].
    weight
        [K, C / groups, R, S].
    stride, padding
        In both directions.
    groups
        Of channels.
    """

    input: tuple[int, int, int]
    weight: tuple[int, int, int, int]
    stride: int
    padding: int
    groups: int

    @property
    def output(self) -> tuple[int, int, int]:
        """[K, OH, OW]."""
        height, width = (
            (size + 2 * self.padding - kernel) // self.stride + 1
            for size, kernel in zip(self.input[1:], self.weight[2:], strict=True)
        )
        return self.weight[0], height, width

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two matrices: 1×1, stride 1, one group."""
        return self.weight[2:] == (1, 1) and (self.stride, self.padding, self.groups) == (1, 0, 1)

    def bytes(self, batch_size: int, element_size: int) -> int:
        """Return the fewest bytes of any of `PASSES`: of its two operands and its result, which have the same sizes."""
        activations = batch_size * (prod(self.input) + prod(self.output))
        return (activations + prod(self.weight)) * element_size

    def flop(self, batch_size: int) -> int:
        """Return the floating-point operations of any of `PASSES`."""
        return 2 * batch_size * prod(self.output) * prod(self.weight[1:])


def distinct_convolutions(names: tuple[str, ...], image_size: int) -> list[ConvShape]:
    """Return the convolutions of some networks, each shape once, in the order in which they run.

    The networks run once, without data.
    """
    found: dict[ConvShape, None] = {}

    def note(conv: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        channels, height, width = inputs[0].shape[1:]
        k, c, r, s = conv.weight.shape
        stride, padding = (int(pair[0]) for pair in (conv.stride, conv.padding))
        found[ConvShape((channels, height, width), (k, c, r, s), stride, padding, conv.groups)] = None

    for name in names:
        with torch.device("meta"):
            network = models.create(name)
            image = torch.empty(2, 3, image_size, image_size)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        network(image)
    return list(found)


class Convolution:
    """One convolution on random activations, channels_last, forward and backward.

    Parameters
    ----------
    shape : ConvShape
        Of the convolution.
    batch_size : int
        Images.
    dtype : torch.dtype
        Of activations, weight and gradients.
    device : torch.device
        Where it runs.
    """

    def __init__(self, shape: ConvShape, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        def random(*size: int) -> Tensor:
            return torch.randn(size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

        self.shape = shape
        self.x = random(batch_size, *shape.input)
        self.weight = random(*shape.weight)
        self.grad = random(batch_size, *shape.output)

    def by_library(self, run: str) -> Callable[[], object]:
        """Return one of `PASSES` as PyTorch runs it: cuDNN's, or oneDNN's."""
        stride, padding, dilation = ([n, n] for n in (self.shape.stride, self.shape.padding, 1))
        groups = self.shape.groups
        if run == FPROP:
            return lambda: torch.conv2d(self.x, self.weight, None, stride, padding, dilation, groups)
        mask = [run == DGRAD, run == WGRAD, False]
        return lambda: _backward(
            self.grad, self.x, self.weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )

    def as_product(self, run: str) -> Callable[[], Tensor]:
        """Return one of `PASSES` of a 1×1 convolution as a product of matrices: cuBLAS's, or MKL's."""
        x, grad = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (self.x, self.grad))
        weight = self.weight.flatten(1)
        operands = {FPROP: (x, weight.t()), DGRAD: (grad, weight), WGRAD: (grad.t(), x)}[run]
        return lambda: torch.mm(*operands)
