"""The Triton kernels beside the reference: every operation, and whole chains made of them.

They run on the GPU that is there, else in Triton's interpreter.
"""

import copy
import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fused_resnet import models, ops
from fused_resnet.blocks.mixin import FusedModule
from fused_resnet.chain import autograd
from fused_resnet.ops.activation import EXAMPLES, NONE, RELU, Act, Kind
from fused_resnet.ops.batch_norm_act import config, reference
from fused_resnet.ops.batch_norm_act_pool import reference as pool_reference
from fused_resnet.surgery import fuse
from tests.support.accuracy import assert_as_accurate_as_stock, gradient_for
from tests.support.problem import EPS, PARTS, Problem, assert_close
from tests.support.triton_engine import triton_kernels

pytestmark = [  # of the interpreter, which takes a program's number from an array, and whose exp is numpy's
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

# fewer rows than a tile, odd channels, few rows, one channel, rows that no tile divides, several parts and column tiles
SHAPES = [(2, 3, 5, 7), (2, 16, 8, 8), (3, 1, 1, 1), (1, 1, 9, 9), (1, 200, 10, 20), (2, 130, 16, 17)]

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
each_act = pytest.mark.parametrize("act", EXAMPLES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@pytest.fixture
def k(monkeypatch):
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # what a test draws is there, too
        yield triton_kernels(monkeypatch)


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    return Problem(*(torch.randn(shape).add(0.5).to(dtype).to(memory_format=torch.channels_last) for _ in range(3)))


def doubled(argument):
    return argument.double() if isinstance(argument, Tensor) else argument


def read_by_gradient(act: Act, *arguments) -> Tensor:
    """What backward reads at a block's end: of a ReLU its output, else what it was made of."""
    return reference.batch_norm_act(*arguments[:4], *(RELU if act == RELU else NONE), *arguments[4:])


def kinks(act: Act) -> tuple[float, ...]:
    """Where its gradient jumps."""
    if act.kind in (Kind.RELU, Kind.LEAKY_RELU):
        return (0,)
    return {Kind.HARDTANH: (act.alpha, act.beta), Kind.HARDSWISH: (-3, 3)}.get(act.kind, ())


@each_shape
@each_dtype
def test_statistics_equal_float64(k, dtype, shape):
    p = problem(shape, dtype)
    moments, affine = k.batch_norm_stats(p.x, p.weight, p.bias, EPS)
    exact, _ = reference.batch_norm_stats(p.x.double(), None, None, EPS)
    assert_close(moments, exact.float(), ulps=8)
    assert_close(affine, reference.batch_norm_affine(moments, p.weight, p.bias, EPS))


@pytest.mark.parametrize("offset", [1, 100, 1000])
def test_statistics_survive_a_mean_far_from_zero(k, offset):
    x = (torch.randn(4, 24, 20, 20) + offset).contiguous(memory_format=torch.channels_last)
    exact, _ = reference.batch_norm_stats(x.double(), None, None, EPS)
    stock = torch.stack((x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), x.var((0, 2, 3))))
    moments, _ = k.batch_norm_stats(x, None, None, EPS)
    named = ({"mean": m[0], "var": m[1], "unbiased": m[2]} for m in (moments, stock, exact))
    assert_as_accurate_as_stock(*named)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_per_channel_steps_equal_the_reference_for_parameters_of_any_dtype(k, parameter_dtype):
    p = problem((2, 24, 5, 5), torch.float32)
    weight, bias = p.weight.to(parameter_dtype), p.bias.to(parameter_dtype)
    sums = torch.randn(4, 24)
    for parameters in [(weight, bias), (weight, None), (None, bias), (None, None)]:
        arguments = (p.moments, *parameters, EPS)
        assert_close(k.batch_norm_affine(*arguments), reference.batch_norm_affine(*arguments))
        for batch_stats, branch in itertools.product((True, False), (0, 1)):
            arguments = (sums, branch, p.moments, parameters[0], EPS, p.count, batch_stats)
            for result, expected in zip(
                k.batch_norm_coefficients(*arguments), reference.batch_norm_coefficients(*arguments), strict=True
            ):
                assert_close(result, expected)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_merging_the_parts_of_a_batch_equals_the_reference(k, ranks, offset):
    counts = torch.randint(0, 1000, (ranks, 1)).float()  # of which the first is empty
    counts[0] = 0
    means, m2 = (torch.randn(ranks, 19) + offset) * counts.sign(), torch.rand(ranks, 19) * counts
    parts, weight, bias = torch.cat((means, m2, counts), 1), torch.randn(19), torch.randn(19)
    for parameters in [(weight, bias), (None, None)]:
        merged, expected = (op.batch_norm_merge(parts, *parameters, EPS) for op in (k, reference))
        for result, wanted in zip((*merged[0], *merged[1]), (*expected[0], *expected[1]), strict=True):
            assert_close(result, wanted)


@pytest.mark.parametrize("branch", ["no residual", "residual", "second branch"])
@each_act
@each_shape
@each_dtype
def test_apply_equals_the_reference(k, dtype, shape, act, branch):
    p = problem(shape, dtype)
    residual = None if branch == "no residual" else p.residual
    arguments = (p.x, p.affine, residual, p.residual_affine if branch == "second branch" else None, *act)
    z = k.batch_norm_act(*arguments)
    assert z.stride() == p.x.stride()
    assert_close(z, reference.batch_norm_act(*arguments))
    k.batch_norm_act_(*arguments)
    assert torch.equal(p.x, z)


@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize(("act", "end"), [(NONE, False), (RELU, False), (RELU, True)], ids=["linear", "of x", "of z"])
@pytest.mark.parametrize("second", ["alone", "masked", "branch"])
@each_shape
@each_dtype
def test_backward_equals_the_reference(k, dtype, shape, second, act, end, batch_stats):
    assert_backward(k, problem(shape, dtype), second, act, end, batch_stats)


@pytest.mark.parametrize(("second", "end"), [("alone", False), ("masked", True), ("branch", True)])
@pytest.mark.parametrize("act", [*EXAMPLES[2:], NONE], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]], ids=lambda s: "x".join(map(str, s)))
@each_dtype
def test_the_backward_of_every_activation_equals_the_reference(k, dtype, shape, act, second, end):
    assert_backward(k, problem(shape, dtype), second, act, end, batch_stats=True)


def assert_backward(k, p: Problem, second: str, act: Act, end: bool, batch_stats: bool) -> None:
    """Both passes, of a unit inside a block, or at its end, where the gradient reads ``z``."""
    z = read_by_gradient(act, p.x, p.affine, p.residual, None) if end else None
    residual, moments = (p.residual, p.residual_moments) if second == "branch" else (None, None)
    # where v comes from x, an element within a rounding error of a kink may fall on either side
    v = torch.addcmul(p.affine[1].view(1, -1, 1, 1), p.x.float(), p.affine[0].view(1, -1, 1, 1))
    for kink in kinks(act):
        p.grad[(v - kink).abs() < 1e-5] = 0

    arguments = (p.grad, p.x, p.moments, p.affine, z, residual, moments, *act)
    exact = reference.batch_norm_act_reduce(*map(doubled, arguments))
    assert_close(k.batch_norm_act_reduce(*arguments), exact.float(), ulps=8)

    sums = reference.batch_norm_act_reduce(*arguments)
    first = p.coefficients(sums, 0, batch_stats)
    other = None if residual is None else p.coefficients(sums, 1, not batch_stats)
    arguments = (p.grad, p.x, p.affine, first, z, residual, other, *act, p.x.shape[1] if second == "masked" else 0)
    results = k.batch_norm_act_backward(*arguments)
    exact = reference.batch_norm_act_backward(*map(doubled, arguments))
    for result, expected in zip(results, exact, strict=True):
        assert_close(result, expected.to(result.dtype))
        assert result.numel() == 0 or result.stride() == p.x.stride()
    if second == "alone":
        wants_activation = z is None and batch_stats
        activation = k.batch_norm_act_backward_(p.grad, p.x, p.affine, first, z, *act, wants_activation)
        assert torch.equal(p.grad, results[0])
        if wants_activation:
            assert torch.equal(activation, k.batch_norm_act(p.x, p.affine, None, None, *act))
            assert activation.stride() == p.x.stride()
        else:
            assert activation.shape == (0,)


@each_act
@pytest.mark.parametrize(("shape", "channels", "first"), PARTS, ids=str)
@each_dtype
def test_a_residual_of_fewer_channels_equals_the_reference(k, dtype, shape, channels, first, act):
    p = problem(shape, dtype)
    branch = (p.x, p.affine, p.part(channels, first), None)
    arguments = (*branch, *act, first)
    z = k.batch_norm_act(*arguments)
    assert z.stride() == p.x.stride()
    assert_close(z, reference.batch_norm_act(*arguments))

    arguments = (
        p.grad,
        p.x,
        p.affine,
        torch.randn(4, shape[1]),
        None if act == NONE else read_by_gradient(act, *branch, first),
        None,
        None,
        *act,
        channels,
        first,
    )
    dx, masked = k.batch_norm_act_backward(*arguments)
    expected, expected_masked = reference.batch_norm_act_backward(*arguments)
    assert_close(dx, expected)
    assert_close(masked, expected_masked)
    if act in (NONE, RELU):
        assert torch.equal(masked, expected_masked)
    assert masked.is_contiguous(memory_format=torch.channels_last)


@each_shape
@each_dtype
def test_the_masked_gradient_and_its_sums_equal_the_reference(k, dtype, shape):
    p = problem(shape, dtype)
    z = p.residual.relu()
    z[0, 0, 0, 0] = torch.nan  # where stock's gradient passes, too
    masked, sums = k.masked_grad(p.grad, z)
    expected, _ = reference.masked_grad(p.grad, z)
    assert masked.stride() == p.grad.stride()
    assert torch.equal(masked, expected)
    assert_close(sums, expected.double().sum((0, 2, 3)).float(), ulps=8)


@pytest.mark.parametrize("adds", [True, False], ids=["of a sum", "alone"])
@each_shape
@each_dtype
def test_the_masked_gradient_in_place_and_its_sums_equal_the_reference(k, dtype, shape, adds):
    p = problem(shape, dtype)
    z, other = p.residual.relu(), p.x if adds else None
    z[0, 0, 0, 0] = torch.nan
    expected = p.grad.clone()
    reference.masked_grad_(expected, other, z)
    sums = k.masked_grad_(p.grad, other, z)
    assert torch.equal(p.grad, expected)
    assert_close(sums, expected.double().sum((0, 2, 3)).float(), ulps=8)


@pytest.mark.parametrize("masks", [True, False])
@each_shape
@each_dtype
def test_the_shortcuts_gradient_is_added_as_in_the_reference(k, dtype, shape, masks):
    p = problem(shape, dtype)
    z = p.residual if masks else None
    expected = p.x.clone()
    reference.add_masked_(expected, p.grad, z)
    k.add_masked_(p.x, p.grad, z)
    assert_close(p.x, expected)


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1)], ids=lambda w: "k{}s{}p{}".format(*w))
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 64, 12, 13), (1, 17, 30, 6)], ids=lambda s: "x".join(map(str, s)))
@each_dtype
def test_pool_equals_the_reference(k, dtype, shape, window):
    p = problem(shape, dtype)
    p.x[0, 0, 1, 1] = torch.nan
    geometry = [[value, value] for value in window]
    z, index = k.batch_norm_act_pool(p.x, p.affine, *RELU, *geometry)
    expected, expected_index = pool_reference.batch_norm_act_pool(p.x, p.affine, *RELU, *geometry)
    assert z.isnan().any()
    assert_close(z, expected)
    if dtype is not torch.float32:  # the product's last bit, which float32 shows, may break a tie
        assert torch.equal(index, expected_index)

    grad = torch.randn(z.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    arguments = (grad, expected_index, list(shape[2:]), *geometry)
    assert_close(k.max_pool_backward(*arguments), pool_reference.max_pool_backward(*arguments))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of inf − inf
def test_nan_and_infinity_come_out_where_stock_gives_them(k):
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    x[0, 0, 1, 2], x[1, 1, 3, 3], x[0, 2, 0, 0] = torch.nan, torch.inf, torch.inf
    stock = torch.nn.functional.batch_norm(x, None, None, training=True, eps=EPS).relu()
    _, affine = k.batch_norm_stats(x, None, None, EPS)
    assert torch.equal(k.batch_norm_act(x, affine, None, None, *RELU).isnan(), stock.isnan())


def test_an_empty_batch_gives_nan_statistics_and_empty_activations(k):
    p = problem((2, 8, 4, 4), torch.float32)
    x = torch.empty(0, 8, 4, 4).to(memory_format=torch.channels_last)
    assert all(result.isnan().all() for result in k.batch_norm_stats(x, None, None, EPS))
    assert k.batch_norm_act(x, p.affine, None, None, *RELU).shape == x.shape
    assert torch.equal(k.batch_norm_act_reduce(x, x, p.moments, p.affine, None, None, None, *RELU), torch.zeros(2, 8))
    dx, _ = k.batch_norm_act_backward(x, x, p.affine, torch.zeros(4, 8), None, None, None, *RELU, 0)
    assert dx.shape == x.shape
    masked, sums = k.masked_grad(x, x)
    assert masked.shape == x.shape
    assert torch.equal(sums, torch.zeros(8))
    assert torch.equal(k.masked_grad_(x, x, x), torch.zeros(8))
    assert k.batch_norm_act_backward_(x, x, p.affine, torch.zeros(4, 8), None, *RELU, True).shape == x.shape


@pytest.mark.parametrize("rows", [1, 63, 64, 200, 12544, 802816, 2**31 + 5])
@pytest.mark.parametrize("channels", [1, 3, 16, 64, 200, 2048])
def test_the_parts_of_a_reduction_cover_every_row_once(rows, channels):
    cut, parts, rows_per_part = config.reduction(rows, channels, 132)
    assert 1 <= parts <= config.MAX_PARTS
    assert rows_per_part % cut.rows == 0
    assert (parts - 1) * rows_per_part < rows <= parts * rows_per_part


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("chain", ["block", "stage"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_network_of_these_kernels_is_as_accurate_as_stock(k, monkeypatch, autocast, chain, memory_format):
    """The stem and every kind of shortcut, forward and backward, in either memory format of the input."""
    if torch.cuda.is_available():
        pytest.skip("tests/test_cuda.py has whole networks on a GPU")

    def step(model, x, dtype=None):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            z = model(x)
        z.backward(gradient_for(z))
        results = {"output": z.detach()}
        results.update({f"{name}.grad": p.grad for name, p in model.named_parameters()})
        results.update({name: b for name, b in model.named_buffers() if b.is_floating_point()})
        return results

    stem = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, bias=False), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1)
    )
    resnet = models.resnet20()
    padded = models.resnet20(shortcut="A").layer3[0]
    bottlenecks = models.resnet50().layer1[:2]
    basic = torch.nn.Sequential(resnet.layer1[0], resnet.layer2[0], padded)
    model = torch.nn.Sequential(stem, basic, bottlenecks)
    model = model.to(memory_format=memory_format)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # no ReLU's input is near 0, where no dtype is right
            torch.nn.init.constant_(module.bias, 6)
    x = torch.randn(2, 3, 20, 20).contiguous(memory_format=memory_format)
    exact = step(copy.deepcopy(model).double(), x.double())
    stock = step(copy.deepcopy(model), x, autocast)
    fused = fuse(copy.deepcopy(model), memory="lean", chain=chain)
    called = Counter()

    def counting(name):
        def call(*args):
            called[name] += 1
            return getattr(k, name)(*args)

        return call

    spied = SimpleNamespace(**{name: counting(name) if callable(f) else f for name, f in vars(k).items()})
    monkeypatch.setattr(ops, "kernels", lambda *_: spied)
    assert autograd.ops is ops
    results = step(fused, x, autocast)
    stages = 2 if chain == "stage" else 0
    assert sum(isinstance(module, FusedModule) for module in fused.modules()) == 6 + stages
    assert_as_accurate_as_stock(results, stock, exact)
    # both bottlenecks' ends and two projections do without their output
    assert (called["pointwise_conv_norm_act"], called["pointwise_conv_norm_backward"]) == (2, 4)
    # in 16 bits the first convolution of each bottleneck, and its projection, make the statistics of their norms
    assert called["pointwise_conv_stats"] == (0 if autocast is None else 3)
    # in a stage a gradient is masked and summed in place where it is read without a y: in 16 bits by the second
    # bottleneck's product; else at the end that reads it, the first bottleneck's and that of a basic block's projection
    by_product = int(bool(stages) and autocast is not None)
    assert called["pointwise_conv_add_grad_"] == by_product
    assert called["masked_grad_"] == (2 - by_product if stages else 0)
