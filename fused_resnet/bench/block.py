"""Forward and backward of one residual block, as each peer runs it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.bench.accuracy import GRADIENT, OUTPUT, STATISTIC, Result
from fused_resnet.bench.peers import DTYPES, EXACT_PEER, Peer, compiled, fused

RESIDUAL_BLOCKS = (models.BasicBlock, models.Bottleneck)


@dataclass(frozen=True)
class BlockShape:
    """A residual block of a network, and what it is given.

    Attributes
    ----------
    model, name
        The network, and the first of its blocks that is like this.
    kind
        The block's class.
    input
        [C, H, W].
    output
        Channels behind it.
    stride
        Of the block.
    """

    model: str
    name: str
    kind: str
    input: tuple[int, int, int]
    output: int
    stride: int


def distinct_blocks(model: str, image_size: int) -> list[BlockShape]:
    """Return a network's blocks, one for each class, channels, stride and input size, in the order in which they run.

    The network runs once, without data.
    """
    with torch.device("meta"):
        network = models.create(model)
        image = torch.empty(2, 3, image_size, image_size)
    found: dict[tuple[object, ...], BlockShape] = {}

    def note(name: str, block: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            channels, height, width = inputs[0].shape[1:]
            assert isinstance(block, RESIDUAL_BLOCKS)
            kind, size = type(block).__name__, (channels, height, width)
            shape = BlockShape(model, name, kind, size, output.shape[1], block.stride)
            found.setdefault((shape.kind, shape.input, shape.output, shape.stride), shape)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, RESIDUAL_BLOCKS):
            module.register_forward_hook(note(name, module))
    network(image)
    return list(found.values())


class BlockStep:
    """Forward and backward of a residual block in training, on random activations.

    Parameters
    ----------
    block : nn.Module
        Stock's block, which is copied.
    x, grad : Tensor
        Its input and the gradient of its output, in the dtype of the activations, channels_last.
    peer : Peer
        Who runs it.
    """

    def __init__(self, block: nn.Module, x: Tensor, grad: Tensor, peer: Peer) -> None:
        exact = peer == EXACT_PEER
        block = copy.deepcopy(block).to(torch.float64 if exact else torch.float32)
        fused(peer, block)
        self.block, self.autocast = block, x.dtype != torch.float32 and not exact
        self.x, self.grad = ((tensor.double() if exact else tensor).detach().clone() for tensor in (x, grad))
        self.x.requires_grad_()
        self._call: Callable[[Tensor], Tensor] = compiled(peer, block, graphed=True)

    @staticmethod
    def make(shape: BlockShape, batch_size: int, dtype: str, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        """Return stock's block, its input and the gradient of its output."""
        torch.manual_seed(0)
        block = models.create(shape.model).get_submodule(shape.name)
        block = block.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        channels, height, width = shape.input
        out = (batch_size, shape.output, -(-height // shape.stride), -(-width // shape.stride))

        def activations(size: tuple[int, ...]) -> Tensor:
            return torch.randn(size, device=device).to(DTYPES[dtype], memory_format=torch.channels_last)

        # what a block reads is what a ReLU wrote
        return block, activations((batch_size, channels, height, width)).relu_(), activations(out)

    def forward(self) -> Tensor:
        """Run the block; autograd keeps what backward needs."""
        with torch.autocast(self.x.device.type, self.x.dtype, enabled=self.autocast):
            return self._call(self.x)

    def __call__(self) -> tuple[Tensor, ...]:
        """Run the block and compute the gradients of its input and of all its parameters."""
        return torch.autograd.grad(self.forward(), [self.x, *self.block.parameters()], self.grad)

    def result(self) -> Result:
        """Return all that the block computes: output, every gradient, and the moved running statistics."""
        z = self.forward()
        names = ["x", *(name for name, _ in self.block.named_parameters())]
        gradients = torch.autograd.grad(z, [self.x, *self.block.parameters()], self.grad)
        statistics = {name: buffer for name, buffer in self.block.named_buffers() if buffer.is_floating_point()}
        return {
            OUTPUT: {"z": z.detach()},
            GRADIENT: dict(zip(names, gradients, strict=True)),
            STATISTIC: statistics,
        }
