"""A 1×1 convolution and its batch norm without the raw output: against autograd, and against stock in every dtype."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import ops
from fused_resnet.ops.batch_norm_act.reference import batch_norm_stats
from fused_resnet.ops.pointwise_conv_norm import reference
from tests.accuracy import assert_as_accurate_as_stock

EPS = 1e-5
FORMATS = [torch.channels_last, torch.contiguous_format]
# inputs, outputs, image: no power of two, more outputs than pixels, rows that no tile divides
SHAPES = [(2, 16, 64, 7, 5), (1, 5, 19, 10, 20), (3, 64, 256, 1, 6), (2, 96, 192, 9, 9)]


class Problem:
    """One unit at a block's end, and what is in front of it: ``relu(a·x + b)``, or ``x`` alone."""

    def __init__(self, shape: tuple[int, ...], prologue: bool, offset: float = 0.0) -> None:
        batch, inputs, outputs, *size = shape
        self.x = torch.randn(batch, inputs, *size) + offset
        self.x_affine = batch_norm_stats(self.x, torch.rand(inputs) + 0.5, torch.randn(inputs), EPS)[1]
        self.x_affine = self.x_affine if prologue else None
        self.conv_weight = torch.randn(outputs, inputs, 1, 1) / inputs**0.5
        self.weight, self.bias = torch.randn(outputs), torch.randn(outputs)
        self.weight[0] = 0
        self.grad = torch.randn(batch, outputs, *size)

    def rounded(self, dtype: torch.dtype, memory_format: torch.memory_format) -> "Problem":
        """The same in what ``dtype`` can hold."""
        for name in ("x", "conv_weight", "grad"):
            setattr(self, name, getattr(self, name).to(dtype).contiguous(memory_format=memory_format))
        return self

    def through_autograd(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """What stock computes in ``dtype``; statistics and parameters are in float32 at least."""
        accumulation = torch.promote_types(dtype, torch.float32)
        u = reference.input_of(self.x.to(dtype), self.affine_in(accumulation), True).requires_grad_()
        conv_weight = self.conv_weight.to(dtype).requires_grad_()
        weight, bias = (t.to(accumulation).requires_grad_() for t in (self.weight, self.bias))
        y = F.conv2d(u, conv_weight)
        z = F.batch_norm(y, None, None, weight, bias, True, 0.0, EPS)
        gradients = torch.autograd.grad(z, (u, conv_weight, weight), self.grad.to(dtype))
        return dict(zip(("u", "conv_weight", "weight"), gradients, strict=True)) | {"z": z.detach()}

    def through(self, k, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """The same from an engine's operations."""
        affine = self.affine_in(torch.promote_types(dtype, torch.float32))
        front = (self.x.to(dtype), affine, True, self.conv_weight.to(dtype))
        weight, bias = (t.to(torch.promote_types(dtype, torch.float32)) for t in (self.weight, self.bias))
        z, moments, _ = k.pointwise_conv_norm_act(*front, weight, bias, EPS, None, None, False)
        grad = self.grad.to(dtype)
        sums = grad.sum((0, 2, 3), dtype=moments.dtype)
        du, d_conv_weight, d_weight = k.pointwise_conv_norm_backward(grad, sums, *front, moments, weight, EPS, True)
        return {"u": du, "conv_weight": d_conv_weight.to(dtype), "weight": d_weight, "z": z}

    def affine_in(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.x_affine is None else self.x_affine.to(dtype)


@pytest.mark.parametrize("prologue", [True, False], ids=["relu(a·x + b)", "x"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition_is_autograds_gradient(shape, prologue):
    p = Problem(shape, prologue)
    for name, expected in p.through_autograd(torch.float64).items():
        torch.testing.assert_close(p.through(reference, torch.float64)[name], expected, msg=name)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prologue", [True, False], ids=["relu(a·x + b)", "x"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_an_engine_is_as_accurate_as_stock(engine, shape, prologue, dtype, memory_format):
    k = ops.kernels(engine, "cpu", dtype)
    fused, stock, exact = [], [], []
    for _ in range(7 if dtype is torch.bfloat16 else 1):
        p = Problem(shape, prologue).rounded(dtype, memory_format)
        fused.append(p.through(k, dtype))
        assert fused[-1]["u"].stride() == p.x.stride()
        stock.append(p.through_autograd(dtype))
        exact.append(p.through_autograd(torch.float64))
    assert_as_accurate_as_stock(fused, stock, exact)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1000.0), (torch.bfloat16, 30.0)], ids=["fp32", "bf16"])
def test_an_input_far_from_zero_loses_no_more_digits_than_in_stock(dtype, offset):
    k = ops.kernels("auto", "cpu", dtype)
    runs = [Problem((2, 16, 64, 14, 14), False, offset).rounded(dtype, torch.channels_last) for _ in range(5)]
    assert_as_accurate_as_stock(
        [p.through(k, dtype) for p in runs],
        [p.through_autograd(dtype) for p in runs],
        [p.through_autograd(torch.float64) for p in runs],
    )


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_an_output_without_variance_gets_the_gradient_of_its_shift_alone(engine):
    p = Problem((2, 16, 64, 5, 5), True)
    p.conv_weight[3] = 0
    p.rounded(torch.float32, torch.channels_last)
    fused, exact = (
        p.through(ops.kernels(engine, "cpu", torch.float32), torch.float32),
        p.through_autograd(torch.float64),
    )
    assert fused["weight"][3] == 0
    torch.testing.assert_close(fused["u"].double(), exact["u"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fused["conv_weight"][3].double(), exact["conv_weight"][3], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_the_input_gets_no_gradient_where_none_is_wanted(engine):
    p = Problem((2, 16, 64, 5, 5), True).rounded(torch.float32, torch.channels_last)
    k = ops.kernels(engine, "cpu", torch.float32)
    moments = k.batch_norm_stats(F.conv2d(reference.input_of(p.x, p.x_affine, True), p.conv_weight), None, None, EPS)[0]
    arguments = (p.grad, p.grad.sum((0, 2, 3)), p.x, p.x_affine, True, p.conv_weight, moments, p.weight, EPS)
    _, *wanted = k.pointwise_conv_norm_backward(*arguments, True)
    du, *gradients = k.pointwise_conv_norm_backward(*arguments, False)
    assert du.numel() == 0
    assert all(map(torch.equal, gradients, wanted))
