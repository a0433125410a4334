"""What is compared: one operation, and one training step, each as a peer computes it.

The peers are ``stock`` (PyTorch's own operations, eagerly), ``fused`` (this package) and ``compile`` (stock under
``torch.compile``). All get the same random inputs, channels_last; ``exact`` is stock in float64 and is never timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import functional, models
from fused_resnet.bench.accuracy import GRADIENT, OUTPUT, STATISTIC, Result
from fused_resnet.bench.harness import STOCK
from fused_resnet.surgery import fuse

FUSED, COMPILED, EXACT = "fused", "compile", "exact"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORTCUTS = ("none", "residual", "dual")
EPS, MOMENTUM = 1e-5, 0.1
RESIDUAL_SCALE = 0.1


class Norm(NamedTuple):
    """A batch norm's statistics and parameters, each [C], float32 as in a network under autocast."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Operation:
    """``relu(batch_norm(x) + shortcut)`` in training, on given tensors.

    Attributes
    ----------
    peer
        Who computes it.
    x
        [N, C, H, W].
    norm
        The batch norm of `x`.
    residual
        What is added, like `x`; or None.
    residual_norm
        The residual's own batch norm, as behind a projection shortcut; or None.
    grad
        The gradient that backward starts from, like `x`.
    engine
        Of the fused peer.
    """

    peer: str
    x: Tensor
    norm: Norm
    residual: Tensor | None
    residual_norm: Norm | None
    grad: Tensor
    engine: str

    @classmethod
    def make(
        cls, shape: tuple[int, int, int, int], shortcut: str, dtype: torch.dtype, device: torch.device, engine: str
    ) -> "Operation":
        """Draw the tensors and return stock's operation on them; `shortcut` is one of `SHORTCUTS`."""
        generator = torch.Generator().manual_seed(0)

        def activations() -> Tensor:
            values = torch.randn(shape, generator=generator)
            return values.to(device, dtype, memory_format=torch.channels_last).requires_grad_()

        def norm() -> Norm:
            channels = shape[1]
            vectors = (torch.rand(channels, generator=generator) + 0.5 for _ in Norm._fields)
            mean, var, weight, bias = (vector.to(device) for vector in vectors)
            return Norm(mean, var, weight.requires_grad_(), bias.sub_(1).requires_grad_())

        return cls(
            STOCK,
            activations(),
            norm(),
            None if shortcut == "none" else activations(),
            norm() if shortcut == "dual" else None,
            activations().detach(),
            engine,
        )

    def by(self, peer: str) -> "Operation":
        """Return the same operation as another peer computes it, with running statistics of its own."""

        def copy(tensor: Tensor) -> Tensor:
            if peer == EXACT:
                tensor = tensor.double()
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        def copy_norm(norm: Norm) -> Norm:
            return Norm(*map(copy, norm))

        return replace(
            self,
            peer=peer,
            x=copy(self.x),
            norm=copy_norm(self.norm),
            residual=None if self.residual is None else copy(self.residual),
            residual_norm=None if self.residual_norm is None else copy_norm(self.residual_norm),
            grad=copy(self.grad),
        )

    def forward(self) -> Tensor:
        """Compute the operation; autograd keeps what backward needs."""
        if self.peer == FUSED:
            return functional.batch_norm_act(
                self.x,
                *self.norm,
                residual=self.residual,
                residual_norm=self.residual_norm,
                momentum=MOMENTUM,
                eps=EPS,
                engine=self.engine,
            )
        z = _batch_norm(self.x, self.norm)
        if self.residual is not None:
            # in place, as in the blocks of the stock networks
            z += self.residual if self.residual_norm is None else _batch_norm(self.residual, self.residual_norm)
        return z.relu_()

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Compute the operation and the gradients of all that it reads."""
        return torch.autograd.grad(self.forward(), list(self.inputs().values()), self.grad)

    def inputs(self) -> dict[str, Tensor]:
        """Return the tensors that get a gradient, by name."""
        named = {"x": self.x, "weight": self.norm.weight, "bias": self.norm.bias}
        if self.residual is not None:
            named["residual"] = self.residual
        if self.residual_norm is not None:
            named |= {"residual weight": self.residual_norm.weight, "residual bias": self.residual_norm.bias}
        return named

    def result(self) -> Result:
        """Return all that the operation computes: output, gradients, and the moved running statistics."""
        z = self.forward()
        inputs = self.inputs()
        gradients = dict(zip(inputs, torch.autograd.grad(z, list(inputs.values()), self.grad), strict=True))
        moved = {"running_mean": self.norm.running_mean, "running_var": self.norm.running_var}
        return {OUTPUT: {"z": z.detach()}, GRADIENT: gradients, STATISTIC: moved}


def _batch_norm(x: Tensor, norm: Norm) -> Tensor:
    return F.batch_norm(x, *norm, training=True, momentum=MOMENTUM, eps=EPS)


@dataclass(frozen=True)
class Workload:
    """A network, and the images that it is trained on.

    Attributes
    ----------
    model
        A name that `fused_resnet.models.create` knows.
    batch_size, image_size
        Images of a step, and their height and width.
    dtype
        ``"fp32"``, or ``"bf16"`` for autocast.
    device
        Where it is trained.
    engine
        Of the fused peer.
    """

    model: str
    batch_size: int
    image_size: int
    dtype: str
    device: torch.device
    engine: str


class TrainingStep:
    """Forward, cross entropy, backward and an SGD step of one network on one batch of random images.

    Parameters
    ----------
    workload : Workload
        What is trained.
    peer : str
        Who trains it.
    """

    def __init__(self, workload: Workload, peer: str) -> None:
        self.workload = workload
        self.peer = peer
        torch.manual_seed(0)  # of the weights, the images and the labels: the same for every peer
        model = models.create(workload.model)
        for module in model.modules():
            if isinstance(module, models.BasicBlock | models.Bottleneck):
                # at full scale, rounding errors grow from block to block until no gradient in bfloat16 means anything
                nn.init.constant_(module.last_norm.weight, RESIDUAL_SCALE)
        size = workload.image_size
        images = torch.randn(workload.batch_size, 3, size, size)
        self.labels = torch.randint(10, (workload.batch_size,)).to(workload.device)

        dtype = torch.float64 if peer == EXACT else torch.float32
        self.images = images.to(workload.device, dtype, memory_format=torch.channels_last)
        self.model = model.to(workload.device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if peer == FUSED:
            fuse(self.model, engine=workload.engine)
        self._call: Callable[[Tensor], Tensor] = (
            torch.compile(self.model, dynamic=False) if peer == COMPILED else self.model
        )
        # a learning rate at which random labels do no harm over any number of steps
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)

    def logits(self) -> Tensor:
        """Run the network."""
        autocast = self.workload.dtype == "bf16" and self.peer != EXACT
        with torch.autocast(self.workload.device.type, torch.bfloat16, enabled=autocast):
            return self._call(self.images)

    def loss(self, logits: Tensor) -> Tensor:
        """Return the cross entropy, in float32 as under autocast."""
        return F.cross_entropy(logits if self.peer == EXACT else logits.float(), self.labels)

    def __call__(self) -> None:
        """Run a whole step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.logits()).backward()
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        """Return what exists whether or not a step runs: parameters and buffers."""
        return [*self.model.parameters(), *self.model.buffers()]

    def result(self) -> Result:
        """Return all that a step computes: logits, every gradient, and the moved running statistics."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.logits()
        self.loss(logits).backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        statistics = {name: buffer for name, buffer in self.model.named_buffers() if buffer.is_floating_point()}
        return {OUTPUT: {"logits": logits.detach()}, GRADIENT: gradients, STATISTIC: statistics}
