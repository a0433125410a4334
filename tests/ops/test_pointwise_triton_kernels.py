"""The Triton kernels of a 1×1 convolution with its batch norm, beside float64 and beside stock in the same dtype.

They run on the GPU that is there, else in Triton's interpreter.
"""

import re

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import ops
from fused_resnet.ops import pointwise_conv_norm
from fused_resnet.ops.activation import EXAMPLES, NONE, RELU
from fused_resnet.ops.pointwise_conv_norm import config
from tests.support.pointwise_problem import SHAPES, Problem, assert_backward, assert_forward
from tests.support.problem import EPS
from tests.support.triton_engine import triton_kernels

# of the interpreter, which takes a program's number from an array
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_prologue = pytest.mark.parametrize("prologue", ["raw", "linear", "relu"])


@pytest.fixture
def k(monkeypatch):
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # what a test draws is there, too
        triton_kernels(monkeypatch)
        yield ops.triton_kernels(pointwise_conv_norm)


@each_prologue
@pytest.mark.parametrize(("branch", "act"), [("none", NONE), ("residual", RELU), ("affine", RELU)], ids=str)
@each_shape
@each_dtype
def test_forward_is_as_accurate_as_stock(k, dtype, shape, branch, act, prologue):
    assert_forward(k, Problem.draw(shape, dtype, prologue, branch), act)


@each_prologue
@each_shape
@each_dtype
def test_backward_is_as_accurate_as_stock(k, dtype, shape, prologue):
    assert_backward(k, Problem.draw(shape, dtype, prologue))


@each_dtype
def test_a_gradient_that_follows_the_output_keeps_its_digits(k, dtype):
    """Where dγ is large, so is ``M``, whose rounding would not average out in the sums of the norm before."""
    p = Problem.draw((4, 16, 32, 32, 64), dtype, "relu")
    normalised = F.batch_norm(p.stock_forward(NONE)["z"].float(), None, None, training=True)
    p.grad += (normalised * torch.randn(64, 1, 1)).to(dtype)
    assert_backward(k, p)


@pytest.mark.parametrize("prologue", ["raw", "relu"])
@pytest.mark.parametrize(("dtype", "offset"), [(torch.bfloat16, 30), (torch.float32, 1000)], ids=["bf16", "fp32"])
def test_a_mean_far_from_zero_costs_no_digits(k, dtype, offset, prologue):
    p = Problem.draw(SHAPES[2], dtype, prologue)
    p.x += offset
    if prologue == "relu":
        p.x_affine = torch.stack((torch.ones(64), torch.zeros(64)))
    assert_forward(k, p, RELU)
    assert_backward(k, p)


@each_dtype
def test_channels_that_do_not_vary(k, dtype):
    """A row of the weight that is 0 and an input that is constant: a variance of 0, and rounding is all there is."""
    p = Problem.draw(SHAPES[2], dtype, "relu")
    p.conv_weight[3] = 0
    p.x_affine[:, 5] = torch.tensor([0.0, 0.3])
    assert_forward(k, p, RELU)
    assert_backward(k, p)
    results = p.forward(k, RELU)
    assert (results["mean"][3], results["var"][3]) == (0, 0)


def test_a_centre_that_is_one_row_is_as_good(k, monkeypatch):
    monkeypatch.setattr(config, "SAMPLED_ROWS", 1)
    p = Problem.draw(SHAPES[0], torch.float32, "relu")
    assert_forward(k, p, RELU)
    assert_backward(k, p)


def test_the_input_gradient_is_left_out_where_nobody_wants_it(k):
    p = Problem.draw(SHAPES[0], torch.float32, "relu")
    with_input, without = (p.backward(k, p.moments(k), wants) for wants in (True, False))
    assert set(without) == {"dW", "dγ"}
    assert all(torch.equal(without[name], with_input[name]) for name in without)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN
def test_nan_comes_out_where_stock_gives_it(k):
    p = Problem.draw(SHAPES[0], torch.float32, "relu", "residual")
    p.residual[0, 2, 3, 4] = torch.nan
    assert torch.equal(p.forward(k, RELU)["z"].isnan(), p.residual.isnan())
    moments = p.moments(k)
    p.grad[0, 7, 1, 1] = torch.nan
    for name, result in p.stock_backward().items():
        assert torch.equal(p.backward(k, moments)[name].isnan(), result.isnan()), name
    for row in (0, 9):  # the first is in every sample
        p.x[0, 1, row, 0] = torch.nan
        assert all(result.isnan().all() for result in p.forward(k, RELU).values())
        p.x[0, 1, row, 0] = 0


def test_an_empty_batch_gives_nan_statistics_and_no_gradient(k):
    p = Problem.draw((0, *SHAPES[0][1:]), torch.float32, "relu")
    results = p.forward(k, RELU)
    assert results.pop("z").shape == p.grad.shape
    assert all(result.isnan().all() for result in results.values())
    du, _, grad_weight, sums = k.pointwise_conv_norm_backward(
        p.grad, torch.zeros(19), p.x, p.x_affine, torch.ones(3, 5), RELU, p.conv_weight, torch.ones(3, 19), p.gram,
        p.weight, EPS, True,
    )  # fmt: skip
    assert du.shape == p.x.shape
    assert torch.equal(grad_weight, torch.zeros(19))
    assert torch.equal(sums, torch.zeros(2, 5))


@pytest.mark.parametrize("act", [act for act in EXAMPLES if act not in (NONE, RELU)], ids=str)
def test_an_activation_that_the_products_do_not_know_is_refused(k, act):
    p = Problem.draw(SHAPES[0], torch.float32, "relu")
    moments = p.moments(k)
    with pytest.raises(ValueError, match="act must be none or relu .*, got " + re.escape(str(act))):
        p.forward(k, act)
    p.x_act = act
    for call in (lambda: p.forward(k, RELU), lambda: p.backward(k, moments)):
        with pytest.raises(ValueError, match="act must be none or relu"):
            call()
