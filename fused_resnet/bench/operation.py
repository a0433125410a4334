"""The operation ``act(batch_norm(x) + shortcut)``, forward and backward, as each peer computes it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import functional
from fused_resnet.bench.accuracy import GRADIENT, OUTPUT, STATISTIC, Result
from fused_resnet.bench.peers import EXACT_PEER, STOCK_PEER, Peer, compiled
from fused_resnet.bench.rows import FUSED

SHORTCUTS = ("none", "residual", "dual")
EPS, MOMENTUM = 1e-5, 0.1

# Torch's own, by the names of ops.activation.BY_NAME; in place where torch can and networks ask for it, as timm's do.
# There autograd keeps the output of relu and leaky_relu, and of the others a copy of the input that it makes first.
STOCK_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "relu": torch.relu_,
    "leaky_relu": partial(F.leaky_relu, inplace=True),
    "hardtanh": partial(F.hardtanh, inplace=True),
    "relu6": partial(F.relu6, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class Norm(NamedTuple):
    """A batch norm's statistics and parameters, each [C], float32 as in a network under autocast."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Operation:
    """``act(batch_norm(x) + shortcut)`` in training, on given tensors.

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
    act
        One of `STOCK_ACTS`.
    """

    peer: Peer
    x: Tensor
    norm: Norm
    residual: Tensor | None
    residual_norm: Norm | None
    grad: Tensor
    act: str = "relu"

    @classmethod
    def make(
        cls,
        shape: tuple[int, int, int, int],
        shortcut: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        act: str = "relu",
    ) -> "Operation":
        """Draw the tensors and return stock's operation on them; `shortcut` is one of `SHORTCUTS`."""
        generator = torch.Generator(device).manual_seed(0)

        def activations() -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.to(dtype, memory_format=torch.channels_last).requires_grad_()

        def norm() -> Norm:
            channels = shape[1]
            mean, var, weight, bias = torch.rand(4, channels, generator=generator, device=device) + 0.5
            return Norm(mean, var, weight.requires_grad_(), bias.sub_(1).requires_grad_())

        return cls(
            STOCK_PEER,
            activations(),
            norm(),
            None if shortcut == "none" else activations(),
            norm() if shortcut == "dual" else None,
            activations().detach(),
            act,
        )

    def by(self, peer: Peer) -> "Operation":
        """Return the same operation as another peer computes it, with running statistics of its own."""

        def copy(tensor: Tensor) -> Tensor:
            if peer == EXACT_PEER:
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

    @property
    def shortcut(self) -> str:
        """Which of `SHORTCUTS` it has."""
        return "none" if self.residual is None else "residual" if self.residual_norm is None else "dual"

    def forward(self) -> Tensor:
        """Compute the operation; autograd keeps what backward needs."""
        if self.peer.name == FUSED:
            return functional.batch_norm_act(
                self.x,
                *self.norm,
                residual=self.residual,
                residual_norm=self.residual_norm,
                momentum=MOMENTUM,
                eps=EPS,
                act=self.act,
                engine=self.peer.engine,
            )
        return self._stock(self.x, self.norm, self.residual, self.residual_norm)

    @cached_property
    def _stock(self) -> Callable[..., Tensor]:
        return compiled(self.peer, _batch_norm_add(STOCK_ACTS[self.act]))

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


def _batch_norm_add(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return stock's operation with an activation."""

    def batch_norm_add_act(x: Tensor, norm: Norm, residual: Tensor | None, residual_norm: Norm | None) -> Tensor:
        v = _batch_norm(x, norm)
        if residual is not None:
            # in place, as in the blocks of the stock networks
            v += residual if residual_norm is None else _batch_norm(residual, residual_norm)
        return act(v)

    return batch_norm_add_act


def _batch_norm(x: Tensor, norm: Norm) -> Tensor:
    return F.batch_norm(x, *norm, training=True, momentum=MOMENTUM, eps=EPS)
