"""The 1×1 convolutions of residual blocks with their batch norms, one by one and part by part.

``x`` is what a convolution reads, [K, H, W], ``y`` its raw output, [N, H, W], ``W`` its weight.  Each step does one
thing more than a step before it, so that the difference of the two is what that costs:

============  ===============================================================================  ===================
step          what is done                                                                     which convolution's
============  ===============================================================================  ===================
fprop         ``y = x·Wᵀ``                                                                     each
fprop+stats   and the statistics of ``y``                                                      first, projection
dgrad+add     ``dx + dy·W`` into the shortcut's gradient ``dx``                                first
dgrad+mask    and the mask by the sign of ``z``, the output of the block before, and the sums  first
dgrad+wgrad   and ``dW``, where ``z`` is what the convolution reads                            first
end           the statistics of ``y``, and ``relu(a·y + b)``, without keeping ``y``            end
end+prologue  with ``x`` made of the raw output of the convolution before                      end
end+residual  and with the shortcut's add                                                      end
wgrad         ``dW`` and ``dγ`` from the gradient behind the batch norm, without ``y``         projection
bwd           and the gradient of ``x``                                                        projection
end wgrad     ``wgrad`` with ``x`` made of the raw output of the convolution before            end
end bwd       and the gradient of ``x``                                                        end
end bwd+sums  and that gradient's sums for the batch norm before                               end
============  ===============================================================================  ===================

Three do them: ``torch``, PyTorch's convolutions between the engine's norm kernels, where every ``y`` is written, kept
and read again; ``fused``, the operations of `fused_resnet.ops` that a chain calls, by the engine's own kernels where it
has some; ``matmul``, the products of ``fused`` alone by torch.mm, which is a price and no result.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet import models, ops
from fused_resnet.bench.accuracy import GRADIENT, OUTPUT, STATISTIC, Result
from fused_resnet.bench.block import RESIDUAL_BLOCKS
from fused_resnet.bench.peers import EXACT_PEER, STOCK_PEER, Peer
from fused_resnet.bench.rows import TORCH
from fused_resnet.ops.activation import NONE, RELU
from fused_resnet.ops.library import accumulation_dtype, dense, rows

FIRST, END, PROJECTION = "first", "end", "projection"
EPS = 1e-5

_backward = torch.ops.aten.convolution_backward.default


class PointwiseShape(NamedTuple):
    """The channels that a 1×1 convolution of stride 1 reads and writes, and the size of either."""

    inputs: int
    outputs: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.inputs}>{self.outputs} {self.height}x{self.width}"


def distinct_pointwise(names: tuple[str, ...], image_size: int) -> dict[PointwiseShape, list[str]]:
    """Return the 1×1 convolutions of some networks' blocks, the largest images first, with what they are in a block.

    A projection has the size that its stride leaves.  The networks run once, without data.
    """
    found: dict[PointwiseShape, list[str]] = {}

    def note(place: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        places = found.setdefault(PointwiseShape(inputs[0].shape[1], *output.shape[1:]), [])
        if place not in places:
            places.append(place)

    for name in names:
        with torch.device("meta"):
            network = models.create(name)
            image = torch.empty(2, 3, image_size, image_size)
        for block in network.modules():
            if isinstance(block, RESIDUAL_BLOCKS):
                for place, conv in _pointwise(block):
                    conv.register_forward_hook(partial(note, place))
        network(image)
    return dict(sorted(found.items(), key=lambda item: -item[0].height * item[0].width))


def _pointwise(block: nn.Module) -> list[tuple[str, nn.Conv2d]]:
    """Return a block's convolutions that are products of matrices, and what each is in it."""
    convs = [(name, child) for name, child in block.named_modules() if isinstance(child, nn.Conv2d)]
    main = [conv for name, conv in convs if not name.startswith("downsample")]
    places = [(PROJECTION, conv) for name, conv in convs if name.startswith("downsample")]
    places += [(place, conv) for place, conv in ((FIRST, main[0]), (END, main[-1])) if conv.stride == (1, 1)]
    return [(place, conv) for place, conv in places if conv.kernel_size == (1, 1)]


@dataclass(frozen=True)
class Pointwise:
    """A step on given tensors, channels_last; those per channel are float32, as under autocast.

    Attributes
    ----------
    step
        What is done.
    peer
        Who does it.
    x
        [B, K, H, W]; where there is a prologue, the raw output of the convolution before.
    x_affine
        The scale and shift [2, K] of the batch norm of `x`; None without a prologue.
    x_moments
        Its moments [3, K]; None where its sums are not wanted.
    conv_weight
        [N, K, 1, 1], in the dtype of `x`.
    weight, bias
        γ and β [N] of the batch norm behind.
    residual
        What is added, [B, N, H, W], or None.
    grad
        The gradient behind the batch norm, masked; or, at a block's first convolution, before it. Like `residual`.
    sum_grad
        Its sum per channel, [N].
    dx
        The shortcut's gradient, like `x`; it is added to.
    z
        The output of the block before, like `x`.
    """

    step: "Step"
    peer: Peer
    x: Tensor
    x_affine: Tensor | None
    x_moments: Tensor | None
    conv_weight: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    grad: Tensor
    sum_grad: Tensor
    dx: Tensor
    z: Tensor

    @classmethod
    def make(
        cls, step: "Step", shape: PointwiseShape, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> "Pointwise":
        """Draw the tensors and return the step as the definition does it."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        def activation(channels: int) -> Tensor:
            values = random(batch_size, channels, shape.height, shape.width)
            return values.to(dtype, memory_format=torch.channels_last)

        x, grad = activation(shape.inputs), activation(shape.outputs)
        grad[activation(shape.outputs) < 0] = 0  # as a ReLU leaves it
        k = ops.kernels("reference", device.type, dtype)
        moments, affine = k.batch_norm_stats(x, *random(2, shape.inputs), EPS)
        return cls(
            step=step,
            peer=STOCK_PEER,
            x=x,
            x_affine=affine if step.prologue else None,
            x_moments=moments if step.sums else None,
            conv_weight=random(shape.outputs, shape.inputs, 1, 1).div(shape.inputs**0.5).to(dtype),
            weight=random(shape.outputs),
            bias=random(shape.outputs),
            residual=activation(shape.outputs) if step.residual else None,
            grad=grad,
            sum_grad=grad.sum((0, 2, 3), dtype=accumulation_dtype(dtype)),
            dx=activation(shape.inputs),
            z=activation(shape.inputs).relu_(),
        )

    def by(self, peer: Peer) -> "Pointwise":
        """Return the same step as another peer does it, with a `dx` of its own."""
        if peer != EXACT_PEER:
            return replace(self, peer=peer, dx=self.dx.clone())
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        doubles = {name: value.double() for name, value in values.items() if isinstance(value, Tensor)}
        return Pointwise(**{**values, **doubles, "peer": peer})

    def result(self) -> Result:
        """Do the step and return all that it computes."""
        return self.step.run(self)

    @cached_property
    def k(self) -> SimpleNamespace:
        """The operations of the engine that serves; stock's and the exact are the definition."""
        return ops.kernels(self.peer.engine or "reference", self.x.device.type, self.x.dtype)

    @property
    def apart(self) -> bool:
        """Whether every convolution and every norm is a kernel of its own."""
        return self.peer.name == TORCH

    def fprop(self) -> Result:
        """Compute ``y``."""
        return {OUTPUT: {"y": torch.conv2d(self.x, self.conv_weight)}}

    def fprop_stats(self) -> Result:
        """Compute ``y`` and its statistics."""
        if self.apart:
            y, moments, affine = self._conv_stats()
        else:
            y, moments, affine = self.k.pointwise_conv_stats(self.x, self.conv_weight, self.weight, self.bias, EPS)
        return {OUTPUT: {"y": y}, STATISTIC: {"moments": moments, "affine": affine}}

    def dgrad_add(self) -> Result:
        """Add ``dy·W`` to `dx`; every call adds it once more, which costs the same."""
        rows(self.dx).addmm_(rows(self.grad), self.conv_weight.flatten(1))
        return {GRADIENT: {"x": self.dx}}

    def dgrad_mask(self) -> Result:
        """Add ``dy·W`` to `dx`, mask it, and sum what passes."""
        return self._first(wants_weight=False)

    def dgrad_wgrad(self) -> Result:
        """Do what `dgrad_mask` does, and compute the weight gradient, whose ``x`` is `z`."""
        return self._first(wants_weight=True)

    def _first(self, wants_weight: bool) -> Result:
        if self.apart:
            self.dgrad_add()
            sums = self.k.masked_grad_(self.dx, None, self.z)
            wanted = [False, True, False]
            geometry = (None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
            dw = _backward(self.grad, self.z, self.conv_weight, *geometry, wanted)[1] if wants_weight else None
        else:
            arguments = (self.dx, self.grad, self.conv_weight, self.z)
            sums, dw = self.k.pointwise_conv_add_grad_(*arguments, wants_weight)
        gradients = {"x": self.dx, "sums": sums}
        return {GRADIENT: {**gradients, "weight": dw} if wants_weight else gradients}

    def end(self) -> Result:
        """Compute the output of a block."""
        if self.apart:
            y, moments, affine = self._conv_stats()
            z = self.k.batch_norm_act(y, affine, self.residual, None, *RELU)
        else:
            z, moments, affine, _ = self._end()
        return {OUTPUT: {"z": z}, STATISTIC: {"moments": moments, "affine": affine}}

    def wgrad(self) -> Result:
        """Compute the gradients of the parameters."""
        return self._gradients(wants_input=False)

    def bwd(self) -> Result:
        """Compute the gradients of the parameters and of the convolution's input."""
        return self._gradients(wants_input=True)

    def _gradients(self, wants_input: bool) -> Result:
        if self.apart:
            du, dw, d_gamma, sums = self._gradients_from_y(wants_input)
        else:
            du, dw, d_gamma, sums = self.k.pointwise_conv_norm_backward(
                self.grad, self.sum_grad, self.x, self.x_affine, self.x_moments, RELU,
                self.conv_weight, *self._forward, self.weight, EPS, wants_input,
            )  # fmt: skip
        gradients = {"weight": dw, "γ": d_gamma}
        if wants_input:
            gradients["x"] = du
        if self.x_moments is not None:
            gradients["sums"] = sums
        return {GRADIENT: gradients}

    def _gradients_from_y(self, wants_input: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        k, (y, moments, affine) = self.k, self._kept
        sums = k.batch_norm_act_reduce(self.grad, y, moments, affine, None, None, None, *NONE)
        count = y.numel() // y.shape[1]
        d_gamma, _, coefficients = k.batch_norm_coefficients(sums, 0, moments, self.weight, EPS, count, True)
        dy, _ = k.batch_norm_act_backward(self.grad, y, affine, coefficients, None, None, None, *NONE, 0)
        du, dw, _ = _backward(
            dy, self._input(), self.conv_weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1,
            [wants_input, True, False],
        )  # fmt: skip
        if self.x_moments is not None:
            sums = k.batch_norm_act_reduce(du, self.x, self.x_moments, self.x_affine, None, None, None, *RELU)
        return du, dw, d_gamma, sums

    def _input(self) -> Tensor:
        """Return what the convolution reads, written to memory."""
        if self.x_affine is None:
            return self.x
        z: Tensor = self.k.batch_norm_act(self.x, self.x_affine, None, None, *RELU)
        return z

    def _conv_stats(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``y``, its moments and its affine, by PyTorch's convolution and the norm kernels."""
        y = dense(torch.conv2d(self._input(), self.conv_weight), self.k.channels_last)
        return (y, *self.k.batch_norm_stats(y, self.weight, self.bias, EPS))

    @cached_property
    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """What forward kept for a backward from ``y``."""
        return self._conv_stats()

    @cached_property
    def _forward(self) -> tuple[Tensor, Tensor]:
        """What forward kept for a backward without ``y``: the moments, and the sums of its own that an end keeps."""
        if self.x_affine is None:  # a projection
            _, moments, _ = self._conv_stats()
            return moments, moments.new_empty(0)
        _, moments, _, gram = self._end()
        return moments, gram

    def _end(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k.pointwise_conv_norm_act(  # type: ignore[no-any-return]
            self.x, self.x_affine, RELU, self.conv_weight, self.weight, self.bias, EPS,
            self.residual, None, RELU,
        )  # fmt: skip

    @cached_property
    def _square(self) -> Tensor:
        """A matrix [K, K]."""
        w = self.conv_weight.flatten(1)
        return w.t() @ w

    def products(self) -> list[Tensor]:
        """Compute the products of the step and nothing else, as the library does."""
        x, grad, w = rows(self.x), rows(self.grad), self.conv_weight.flatten(1)
        operands = {
            FPROP: (x, w.t()),
            DGRAD: (grad, w),
            WGRAD: (grad.t(), x),
            GRAM: (x.t(), x),
            MIXING: (x, self._square),
        }
        return [torch.mm(*operands[name]) for name in self.step.products]


FPROP, DGRAD, WGRAD, GRAM, MIXING = "x·Wᵀ", "dy·W", "dyᵀ·x", "xᵀ·x", "x·M"


class Step(NamedTuple):
    """Something that is done around a 1×1 convolution.

    Attributes
    ----------
    name
        What it is called.
    places
        Of which of a block's convolutions it is a step.
    run
        Does it.
    products
        That the fused operation makes.
    passes
        How many tensors of the size of ``x`` and of ``y`` it reads and writes at the least.
    prologue, residual, sums
        What belongs to it.
    fused
        Whether there is an operation for it; else it is there to be compared with.
    """

    name: str
    places: tuple[str, ...]
    run: Callable[[Pointwise], Result]
    products: tuple[str, ...]
    passes: tuple[int, int]
    prologue: bool = False
    residual: bool = False
    sums: bool = False
    fused: bool = True

    def bytes(self, shape: PointwiseShape, batch_size: int, element_size: int) -> int:
        """Return the fewest bytes, those of the weight once."""
        pixels = batch_size * shape.height * shape.width
        of_x, of_y = self.passes
        elements = pixels * (of_x * shape.inputs + of_y * shape.outputs) + shape.inputs * shape.outputs
        return elements * element_size

    def flop(self, shape: PointwiseShape, batch_size: int) -> int:
        """Return the floating-point operations of the products."""
        others = (shape.inputs if name in (GRAM, MIXING) else shape.outputs for name in self.products)
        return 2 * batch_size * shape.height * shape.width * shape.inputs * sum(others)


# without y its statistics are made of a product and a pass of their own, which an end's backward makes use of again
ACT, GRADIENTS = (GRAM, FPROP), (WGRAD, DGRAD, MIXING)

STEPS = (
    Step("fprop", (FIRST, END, PROJECTION), Pointwise.fprop, (FPROP,), (1, 1), fused=False),
    Step("fprop+stats", (FIRST, PROJECTION), Pointwise.fprop_stats, (FPROP,), (1, 1)),
    Step("dgrad+add", (FIRST,), Pointwise.dgrad_add, (DGRAD,), (2, 1), fused=False),
    Step("dgrad+mask", (FIRST,), Pointwise.dgrad_mask, (DGRAD,), (3, 1)),
    Step("dgrad+wgrad", (FIRST,), Pointwise.dgrad_wgrad, (DGRAD, WGRAD), (3, 1)),
    Step("end", (END,), Pointwise.end, ACT, (2, 1)),
    Step("end+prologue", (END,), Pointwise.end, ACT, (2, 1), prologue=True),
    Step("end+residual", (END,), Pointwise.end, ACT, (2, 2), prologue=True, residual=True),
    Step("wgrad", (PROJECTION,), Pointwise.wgrad, (GRAM, WGRAD), (2, 1)),
    Step("end wgrad", (END,), Pointwise.wgrad, (WGRAD,), (1, 1), prologue=True),
    Step("bwd", (PROJECTION,), Pointwise.bwd, (GRAM, *GRADIENTS), (4, 2)),
    Step("end bwd", (END,), Pointwise.bwd, GRADIENTS, (3, 2), prologue=True),
    Step("end bwd+sums", (END,), Pointwise.bwd, GRADIENTS, (3, 2), prologue=True, sums=True),
)
