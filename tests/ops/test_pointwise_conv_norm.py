"""A 1×1 convolution and its batch norm without the raw output: the definition, and what is made of torch's own."""

import pytest
import torch

from fused_resnet import ops
from fused_resnet.ops.activation import RELU
from fused_resnet.ops.pointwise_conv_norm import reference
from tests.support.pointwise_problem import SHAPES, Problem, assert_backward, assert_forward

ENGINES = ["cpu", "reference"]  # whose norm kernels it is made of
FORMATS = [torch.channels_last, torch.contiguous_format]

each_engine = pytest.mark.parametrize("engine", ENGINES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_prologue = pytest.mark.parametrize("prologue", ["raw", "linear", "relu"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@each_prologue
@each_shape
def test_the_definition_is_autograds(shape, prologue):
    p = Problem.draw(shape, torch.float32, prologue, "affine").double()
    for got, wanted in [
        (p.forward(reference, RELU), p.stock_forward(RELU)),
        (p.backward(reference, p.moments(reference)), p.stock_backward()),
    ]:
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name])


@pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
@each_prologue
@each_shape
@each_dtype
@each_engine
def test_it_is_as_accurate_as_stock(engine, dtype, shape, prologue, memory_format):
    k = ops.kernels(engine, "cpu", dtype)
    p = Problem.draw(shape, dtype, prologue, "residual", memory_format)
    assert_forward(k, p, RELU)
    assert_backward(k, p)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1000), (torch.bfloat16, 30)], ids=["fp32", "bf16"])
@each_engine
def test_a_mean_far_from_zero_costs_no_digits(engine, dtype, offset):
    k = ops.kernels(engine, "cpu", dtype)
    p = Problem.draw(SHAPES[2], dtype, "raw")
    p.x += offset
    assert_backward(k, p)


@each_engine
def test_channels_that_do_not_vary(engine):
    k = ops.kernels(engine, "cpu", torch.float32)
    p = Problem.draw(SHAPES[2], torch.float32, "relu")
    p.conv_weight[3] = 0
    p.x_affine[:, 5] = torch.tensor([0.0, 0.3])
    assert_backward(k, p)


@each_engine
def test_the_input_gradient_is_left_out_where_nobody_wants_it(engine):
    k = ops.kernels(engine, "cpu", torch.float32)
    p = Problem.draw(SHAPES[0], torch.float32, "relu")
    with_input, without = (p.backward(k, p.moments(k), wants) for wants in (True, False))
    assert set(without) == {"dW", "dγ"}
    assert all(torch.equal(without[name], with_input[name]) for name in without)
