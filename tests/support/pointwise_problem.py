"""What the tests of a 1×1 convolution with its batch norm share, whichever engine serves."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops.activation import NONE, RELU, Act, value
from fused_resnet.ops.batch_norm_act.reference import batch_norm_act_reduce
from fused_resnet.ops.pointwise_conv_norm import reference
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.problem import EPS, assert_close, moments_of

# images, inputs, height, width, outputs: rows that no tile divides, channels that no vector divides, several tiles of
# either, one step of a product and several
SHAPES = [(1, 5, 10, 20, 19), (2, 16, 9, 5, 64), (1, 64, 20, 20, 256), (3, 96, 7, 7, 64), (2, 200, 5, 9, 33)]


class Problem(SimpleNamespace):
    """The arguments of both operations, and the same convolution and batch norm by autograd."""

    @classmethod
    def draw(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        prologue: str,
        branch: str = "none",
        memory_format: torch.memory_format = torch.channels_last,
    ) -> "Problem":
        n, inputs, height, width, outputs = shape

        def activation(channels: int) -> Tensor:
            values = torch.randn(n, channels, height, width).add(0.5).to(dtype)
            return values.contiguous(memory_format=memory_format)

        grad = activation(outputs)
        grad[torch.randn(grad.shape) < 0] = 0  # as a ReLU leaves it
        return cls(
            x=activation(inputs),
            x_affine=None if prologue == "raw" else torch.randn(2, inputs),
            x_act=RELU if prologue == "relu" else NONE,
            conv_weight=torch.randn(outputs, inputs, 1, 1).div(inputs**0.5).to(dtype),
            weight=torch.randn(outputs),
            bias=torch.randn(outputs),
            residual=None if branch == "none" else activation(outputs),
            residual_affine=torch.randn(2, outputs) if branch == "affine" else None,
            grad=grad,
        )

    def double(self) -> "Problem":
        return Problem(**{k: v.double() if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def forward(self, k, act: Act) -> dict[str, Tensor]:
        z, moments, affine, self.gram = k.pointwise_conv_norm_act(
            self.x, self.x_affine, self.x_act, self.conv_weight, self.weight, self.bias, EPS,
            self.residual, self.residual_affine, act,
        )  # fmt: skip
        return {"z": z, "mean": moments[0], "var": moments[1], "unbiased": moments[2], "a": affine[0], "b": affine[1]}

    def backward(self, k, moments: Tensor, wants_input: bool = True) -> dict[str, Tensor]:
        sum_grad = self.grad.sum((0, 2, 3), dtype=moments.dtype)
        x_moments = None if self.x_affine is None else moments_of(self.x)
        du, d_conv_weight, grad_weight, sums = k.pointwise_conv_norm_backward(
            self.grad, sum_grad, self.x, self.x_affine, x_moments, self.x_act, self.conv_weight, moments, self.gram,
            self.weight, EPS, wants_input,
        )  # fmt: skip
        assert not du.numel() or du.stride() == self.x.stride()
        if x_moments is None or not wants_input:
            assert not sums.numel()
        else:  # of the rounded du
            norm = (t.double() for t in (du, self.x, x_moments, self.x_affine))
            exact = batch_norm_act_reduce(*norm, None, None, None, *self.x_act)
            assert_close(sums, exact.to(sums.dtype), ulps=16)
        return self.gradients(du, d_conv_weight, grad_weight)

    def gradients(self, du: Tensor, d_conv_weight: Tensor, grad_weight: Tensor) -> dict[str, Tensor]:
        results = {"dW": d_conv_weight.to(self.x.dtype), "dγ": grad_weight}
        if du.numel():
            u = reference.input_of(self.x, self.x_affine, self.x_act)
            results["du"] = du
            results["the dβ before"] = (du * (u > 0)).sum((0, 2, 3), dtype=grad_weight.dtype)
        return results

    def stock_forward(self, act: Act) -> dict[str, Tensor]:
        y = F.conv2d(reference.input_of(self.x, self.x_affine, self.x_act), self.conv_weight)
        var, mean = torch.var_mean(y.to(self.weight.dtype), (0, 2, 3), correction=0)
        z = F.batch_norm(y, None, None, self.weight, self.bias, True, 0.0, EPS)
        if self.residual is not None:
            side = self.residual
            if self.residual_affine is not None:
                a, b = self.residual_affine.view(2, 1, -1, 1, 1)
                side = torch.addcmul(b, side, a).to(side.dtype)
            z = z + side
        count = y.numel() // y.shape[1]
        a = self.weight * (var + EPS).rsqrt()
        rows = {"mean": mean, "var": var, "unbiased": var * count / (count - 1), "a": a, "b": self.bias - mean * a}
        return {"z": value(act, z), **rows}

    def stock_backward(self) -> dict[str, Tensor]:
        u = reference.input_of(self.x, self.x_affine, self.x_act).detach()
        leaves = [t.clone().requires_grad_() for t in (u, self.conv_weight, self.weight)]
        z = F.batch_norm(F.conv2d(*leaves[:2]), None, None, leaves[2], self.bias, True, 0.0, EPS)
        return self.gradients(*torch.autograd.grad(z, leaves, self.grad))

    def moments(self, k) -> Tensor:
        results = self.forward(k, NONE)
        return torch.stack([results[name] for name in ("mean", "var", "unbiased")])


def assert_forward(k, p: Problem, act: Act) -> None:
    assert_as_accurate_as_stock(p.forward(k, act), p.stock_forward(act), p.double().stock_forward(act))


def assert_backward(k, p: Problem) -> None:
    results = p.backward(k, p.moments(k))
    assert_as_accurate_as_stock(results, p.stock_backward(), p.double().stock_backward())
