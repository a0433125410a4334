"""The activations of the Triton kernels beside stock's: accuracy, and what is special among the values.

They run on the GPU that is there, else in Triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops import activation
from fused_resnet.ops.activation import EXAMPLES, NONE, RELU, Act, Kind
from fused_resnet.ops.batch_norm_act_pool import reference as pool_reference
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.problem import EPS, assert_close
from tests.support.triton_engine import triton_kernels

pytestmark = [  # of the interpreter, which takes a program's number from an array, and whose arithmetic is numpy's
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]

each_act = pytest.mark.parametrize("act", EXAMPLES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def k(monkeypatch):
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # what a test draws is there, too
        yield triton_kernels(monkeypatch)


def test_the_numbers_are_pythons(k):
    from fused_resnet.ops import triton_activation

    assert {kind: getattr(triton_activation, kind.name).value for kind in Kind} == {kind: kind.value for kind in Kind}


class Step:
    """A batch norm, perhaps with a residual, and an activation, forward and backward."""

    def __init__(self, act: Act, dtype: torch.dtype, ends: bool, scale: float) -> None:
        def random() -> Tensor:
            return torch.randn(4, 24, 12, 12).to(dtype).contiguous(memory_format=torch.channels_last)

        self.act, self.x, self.grad = act, random(), random()
        self.weight, self.bias = scale * (torch.rand(24) + 0.5), torch.randn(24)
        self.residual = random() if ends else None

    def by(self, k) -> dict[str, Tensor]:
        """What a chain does: at a block's end the gradient reads the sum, made again."""
        moments, affine = k.batch_norm_stats(self.x, self.weight, self.bias, EPS)
        z = k.batch_norm_act(self.x, affine, self.residual, None, *self.act)
        v = None if self.residual is None else k.batch_norm_act(self.x, affine, self.residual, None, *NONE)
        sums = k.batch_norm_act_reduce(self.grad, self.x, moments, affine, v, None, None, *self.act)
        count = self.x.numel() // self.x.shape[1]
        d_weight, d_bias, coefficients = k.batch_norm_coefficients(sums, 0, moments, self.weight, EPS, count, True)
        masked = 0 if v is None else self.x.shape[1]
        dx, d_residual = k.batch_norm_act_backward(
            self.grad, self.x, affine, coefficients, v, None, None, *self.act, masked
        )
        results = {"z": z, "x": dx, "weight": d_weight, "bias": d_bias}
        return results if v is None else {**results, "residual": d_residual}

    def by_stock(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual}
        a = {name: t.to(dtype or t.dtype).requires_grad_() for name, t in named.items() if t is not None}
        v = F.batch_norm(a["x"], None, None, a["weight"], a["bias"], True, 0.0, EPS)
        z = activation.value(self.act, v + a["residual"] if "residual" in a else v)
        gradients = torch.autograd.grad(z, list(a.values()), self.grad.to(z.dtype))
        return {"z": z.detach(), **dict(zip(a, gradients, strict=True))}


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("ends", [False, True], ids=["inside a block", "at its end"])
@each_dtype
@each_act
def test_a_step_is_as_accurate_as_stock(k, act, dtype, ends, scale):
    steps = [Step(act, dtype, ends, scale) for _ in range(3)]
    assert_as_accurate_as_stock(
        [step.by(k) for step in steps],
        [step.by_stock() for step in steps],
        [step.by_stock(torch.float64) for step in steps],
    )


def value_and_gradient(k, act: Act, v: Tensor, by_z: bool) -> tuple[Tensor, Tensor]:
    """Of single numbers: a batch norm that changes nothing."""
    x = v.view(1, 1, -1, 1).contiguous(memory_format=torch.channels_last)
    identity = torch.tensor([[1.0], [0.0]])
    z = k.batch_norm_act(x, identity, None, None, *act)
    one = torch.ones_like(x)
    g, _ = k.batch_norm_act_backward(one, x, identity, identity[:1], x if by_z else None, None, None, *act, 0)
    return z.flatten(), g.flatten()


@pytest.mark.parametrize("by_z", [False, True], ids=["of x", "of z"])
@each_act
def test_values_and_gradients_far_out_and_at_the_kinks_are_stocks_in_float64(k, act, by_z):
    """In float32 stock's own are NaN or infinite in places: gelu of infinity, hardswish of 1e38, gelu_tanh's slope."""
    far = torch.tensor([1e2, 1e4, 1e10, 1e20, 1e30, 1e38])
    v = torch.cat((torch.tensor([0.0, -0.0, -1, 1, 2, -2, 3, -3, 1e-30, -1e-30, 9.99, -9.99]), far, -far))
    exact = v.double().requires_grad_()
    expected = activation.value(act, exact)
    slope = torch.autograd.grad(expected.sum(), exact)[0]
    for got, wanted in zip(value_and_gradient(k, act, v, by_z), (expected.detach(), slope), strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-6, atol=1e-6)


@each_act
def test_a_gradient_far_out_stays_what_it_is(k, act):
    """What saturates is 0, up to 1e-35, on the left and 1 on the right."""
    v = torch.tensor([-1e30, -torch.finfo(torch.float32).max, 1e30, torch.finfo(torch.float32).max])
    _, gradient = value_and_gradient(k, act, v, False)
    left, right = {Kind.NONE: (1, 1), Kind.LEAKY_RELU: (act.alpha, 1), Kind.HARDTANH: (0, 0)}.get(act.kind, (0, 1))
    torch.testing.assert_close(gradient, torch.tensor([left, left, right, right]).float(), rtol=0, atol=1e-35)


@each_act
def test_infinity_and_nan_give_what_stock_gives(k, act):
    v = torch.tensor([torch.inf, -torch.inf, torch.nan])
    z, _ = value_and_gradient(k, act, v, False)
    assert torch.equal(z.nan_to_num(7, 8, 9), activation.value(act, v.double()).float().nan_to_num(7, 8, 9))
    assert (act.kind in (Kind.SILU, Kind.HARDSWISH, Kind.GELU, Kind.GELU_TANH)) == bool(z[1].isnan())
    _, gradient = value_and_gradient(k, act, v[2:], False)
    # a comparison that is false lets a gradient pass, as in stock
    passes = {Kind.LEAKY_RELU: act.alpha, Kind.NONE: 1, Kind.RELU: 1, Kind.HARDTANH: 1}.get(act.kind, torch.nan)
    torch.testing.assert_close(gradient, torch.tensor([float(passes)]), rtol=0, atol=0, equal_nan=True)


@each_act
def test_what_is_finite_comes_out_finite(k, act):
    bits = torch.arange(0, 0x7F800000, 0x7F800000 // 4096, dtype=torch.int32)  # of numbers of every size
    v = bits.view(torch.float32)
    z, gradient = value_and_gradient(k, act, torch.cat((v, -v)), False)
    assert z.isfinite().all()
    assert gradient.abs().max() < 1.5  # of hardswish, before 3


@pytest.mark.parametrize("act", EXAMPLES[2:], ids=str)
@each_dtype
def test_the_pool_takes_the_maximum_of_the_activation(k, dtype, act):
    """Of one that falls and rises again, too; equal maxima are told apart by the activation as it would be stored."""
    x = torch.randn(2, 17, 12, 9).mul(3).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 1, 1] = torch.nan
    affine, geometry = torch.stack((torch.randn(17), torch.randn(17))), ([3, 3], [2, 2], [1, 1])
    pooled, index = k.batch_norm_act_pool(x, affine, *act, *geometry)
    z = k.batch_norm_act(x, affine, None, None, *act)
    assert_close(pooled, F.max_pool2d(z, *geometry))
    taken = pool_reference.max_pool_backward(torch.ones_like(pooled), index, [12, 9], *geometry) > 0
    assert torch.equal(taken[0, 0, :3, :3].nonzero(), torch.tensor([[1, 1]]))
    expected, _ = pool_reference.batch_norm_act_pool(x, affine, *act, *geometry)
    assert_close(pooled, expected)
    windows = F.unfold(z.float(), 3, padding=1, stride=2).view(2, 17, 9, *pooled.shape[2:])
    places = windows.gather(2, index.long().unsqueeze(2)).squeeze(2)
    assert_close(places.to(dtype), pooled)


def test_without_an_activation_z_is_ignored(k):
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    identity, nothing = torch.tensor([[1.0], [0.0]]).expand(2, 8).contiguous(), torch.full_like(x, torch.nan)
    dx, _ = k.batch_norm_act_backward(x, x, identity, identity[:1], nothing, None, None, *NONE, 0)
    assert torch.equal(dx, x)
    sums = k.batch_norm_act_reduce(x, x, torch.zeros(3, 8), identity, nothing, None, None, *NONE)
    assert sums.isfinite().all()


def test_the_gradient_by_a_relus_output_is_that_by_what_it_was_made_of(k):
    v = torch.randn(4096)
    x = v.view(1, 1, -1, 1)
    identity = torch.tensor([[1.0], [0.0]])
    by_v, by_output = (
        k.batch_norm_act_backward(x, x, identity, identity[:1], z, None, None, *RELU, 0)[0] for z in (x, x.relu())
    )
    assert torch.equal(by_v, by_output)
