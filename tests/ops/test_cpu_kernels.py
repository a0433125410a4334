"""The native CPU kernels beside the reference, operation by operation, and their sums beside float64."""

import copy
import io
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.engines import libraries
from fused_resnet.ops.activation import NONE, RELU, Act, Kind
from fused_resnet.ops.batch_norm_act import reference
from fused_resnet.ops.batch_norm_act_pool import reference as pool_reference
from fused_resnet.ops.library import accumulation_dtype
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.activations import assert_gradient_close, drop_kinks, each_act, each_act_and_source, source_of_mask
from tests.support.problem import EPS, PARTS, Problem, assert_close, moments_of

pytestmark = pytest.mark.skipif(libraries.load_cpu_library() is not None, reason=str(libraries.load_cpu_library()))

ops = torch.ops.fused_resnet

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
FORMATS = [torch.channels_last, torch.contiguous_format]
# short pixels (put side by side), a cut last row, odd channels, one pixel, a plane no vector divides, several tiles
SHAPES = [(2, 3, 5, 7), (2, 16, 8, 8), (5, 513, 1, 1), (1, 1, 9, 9), (2, 24, 1, 11), (1, 1025, 4, 4), (2, 64, 40, 40)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_format = pytest.mark.parametrize("memory_format", FORMATS, ids=["channels_last", "contiguous"])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def problem(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Problem:
    return Problem(
        *(torch.randn(shape, dtype=torch.float64).add(0.5).to(dtype).to(memory_format=memory_format) for _ in range(3))
    )


def preactivation_of(p: Problem) -> Tensor:
    return torch.addcmul(p.affine[1].view(1, -1, 1, 1), p.x.to(p.affine.dtype), p.affine[0].view(1, -1, 1, 1))


def ulps_of_a_sum(dtype: torch.dtype, terms: int) -> float:
    """Sums are made in double: of no account below it, and earning √terms units where the result is double itself."""
    return 8 + terms**0.5 if dtype is torch.float64 else 8


@each_shape
@each_format
@each_dtype
def test_statistics_equal_the_reference(dtype, memory_format, shape):
    p = problem(shape, dtype, memory_format)
    moments, affine = ops.batch_norm_stats(p.x, p.weight, p.bias, EPS)
    exact = moments_of(p.x.double())
    assert_close(moments, exact.to(accumulation_dtype(dtype)), ulps_of_a_sum(dtype, p.count))
    assert torch.equal(affine, ops.batch_norm_affine(moments, p.weight, p.bias, EPS))


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_dtype
def test_per_channel_steps_equal_the_reference_for_parameters_of_any_dtype(dtype, parameter_dtype):
    p = problem((2, 24, 5, 5), dtype, torch.channels_last)
    weight, bias = p.weight.to(parameter_dtype), p.bias.to(parameter_dtype)
    sums = reference.batch_norm_act_reduce(
        p.grad, p.x, p.moments, p.affine, None, p.residual, p.residual_moments, *RELU
    )
    for parameters in [(weight, bias), (weight, None), (None, bias), (None, None)]:
        arguments = (p.moments, *parameters, EPS)
        assert_close(ops.batch_norm_affine(*arguments), reference.batch_norm_affine(*arguments))
        for batch_stats, branch in itertools.product((True, False), (0, 1)):
            arguments = (sums, branch, p.moments, parameters[0], EPS, p.count, batch_stats)
            for result, expected in zip(
                ops.batch_norm_coefficients(*arguments), reference.batch_norm_coefficients(*arguments), strict=True
            ):
                assert_close(result, expected)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None], ids=str)
@pytest.mark.parametrize("running_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_dtype
def test_running_statistics_move_as_in_the_reference(dtype, running_dtype, momentum):
    moments = [torch.rand(3, channels, dtype=accumulation_dtype(dtype)) for channels in (5, 24)]
    running = [[torch.rand(m.shape[1]).to(running_dtype) for m in moments] for _ in range(2)]
    counters = [torch.tensor(0), torch.tensor(6)]
    expected = copy.deepcopy((*running, counters))
    reference.update_running_stats_(*expected, moments, momentum)
    ops.update_running_stats_(*running, counters, moments, momentum)
    assert counters == expected[2] == [1, 7]
    for got, wanted in zip(itertools.chain(*running), itertools.chain(*expected[:2]), strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": []}, "means must have 1 tensors, as moments has, got 0"),
        ({"variances": [torch.ones(4)] * 2}, "variances must have 1 tensors, as moments has, got 2"),
        ({"counters": [], "momentum": None}, "counters must have 1 tensors, as moments has, got 0"),
        ({"counters": [torch.tensor(3.0)]}, r"counters must have dtype int64 .*, got Float"),
        ({"means": [torch.zeros(5)]}, r"means must have shape \[4\], got \[5\]"),
    ],
)
def test_running_statistics_that_do_not_fit_are_named(change, message):
    arguments = {"means": [torch.zeros(4)], "variances": [torch.ones(4)], "counters": [torch.tensor(3)]}
    arguments = {**arguments, "moments": [torch.rand(3, 4)], "momentum": 0.1, **change}
    with pytest.raises(RuntimeError, match="fused_resnet::update_running_stats_: " + message):
        ops.update_running_stats_(**arguments)


@pytest.mark.parametrize("branch", ["no residual", "residual", "second branch"])
@each_act
@each_shape
@each_format
@each_dtype
def test_apply_equals_the_reference(dtype, memory_format, shape, act, branch):
    p = problem(shape, dtype, memory_format)
    residual = None if branch == "no residual" else p.residual
    residual_affine = p.residual_affine if branch == "second branch" else None
    arguments = (p.x, p.affine, residual, residual_affine, *act)
    z = ops.batch_norm_act(*arguments)
    assert z.stride() == p.x.stride()
    assert_close(z, reference.batch_norm_act(*arguments))
    in_place = p.x.clone()
    ops.batch_norm_act_(in_place, *arguments[1:])
    assert torch.equal(in_place, z)


@each_shape
@each_format
@each_dtype
def test_the_masked_gradient_and_its_sum_equal_the_reference(dtype, memory_format, shape):
    p = problem(shape, dtype, memory_format)
    z = p.x.relu()
    z[0, 0, 0, 0] = torch.nan  # where it passes, as in stock
    masked, sums = ops.masked_grad(p.grad, z)
    expected, _ = reference.masked_grad(p.grad, z)
    assert torch.equal(masked, expected)
    assert masked.stride() == p.grad.stride()
    assert_close(sums, expected.double().sum((0, 2, 3)).to(sums.dtype), ulps_of_a_sum(dtype, p.count))


@pytest.mark.parametrize("adds", [True, False], ids=["of a sum", "alone"])
@each_shape
@each_format
@each_dtype
def test_the_masked_gradient_in_place_and_its_sum_equal_the_reference(dtype, memory_format, shape, adds):
    p = problem(shape, dtype, memory_format)
    z, other = p.x.relu(), p.residual if adds else None
    z[0, 0, 0, 0] = torch.nan
    expected = p.grad.clone()
    reference.masked_grad_(expected, other, z)
    sums = ops.masked_grad_(p.grad, other, z)
    assert torch.equal(p.grad, expected)
    assert_close(sums, expected.double().sum((0, 2, 3)).to(sums.dtype), ulps_of_a_sum(dtype, p.count))


@pytest.mark.parametrize("write_masked", [True, False], ids=["masked", "dx only"])
@each_act_and_source
@pytest.mark.parametrize("branches", [1, 2])
@each_shape
@each_format
@each_dtype
def test_backward_equals_the_reference(dtype, memory_format, shape, branches, act, source, write_masked):
    p = problem(shape, dtype, memory_format)
    z = reference.batch_norm_act(p.x, p.affine, p.residual, None, *source_of_mask(act)) if source == "z" else None
    residual, moments = (p.residual, p.residual_moments) if branches == 2 else (None, None)
    drop_kinks(p.grad, act, preactivation_of(p))

    arguments = (p.grad, p.x, p.moments, p.affine, z, residual, moments, *act)
    sums = ops.batch_norm_act_reduce(*arguments)
    exact = [t.double() if isinstance(t, Tensor) else t for t in arguments]
    assert_close(sums, reference.batch_norm_act_reduce(*exact).to(sums.dtype), ulps_of_a_sum(dtype, p.count))

    expected_sums = reference.batch_norm_act_reduce(*arguments)
    coefficients = p.coefficients(expected_sums, 0)
    residual_coefficients = None if residual is None else p.coefficients(expected_sums, 1)
    arguments = (p.grad, p.x, p.affine, coefficients, z, residual, residual_coefficients, *act)
    arguments += (p.x.shape[1] if write_masked else 0,)
    expected = reference.batch_norm_act_backward(*arguments)
    used = coefficients, residual_coefficients
    for result, wanted, rows in zip(ops.batch_norm_act_backward(*arguments), expected, used, strict=True):
        assert_gradient_close(result, wanted, act, p.grad, rows)
        assert result.numel() == 0 or result.stride() == p.x.stride()


@pytest.mark.parametrize("wants_activation", [True, False], ids=["activation", "dx only"])
@each_act_and_source
@each_shape
@each_format
@each_dtype
def test_backward_in_place_gives_the_same_dx_and_the_forwards_activation(
    dtype, memory_format, shape, act, source, wants_activation
):
    wants_activation &= source == "x"
    p = problem(shape, dtype, memory_format)
    z = p.residual if source == "z" else None
    for coefficients in (torch.randn(4, shape[1], dtype=p.affine.dtype), p.affine[:1].contiguous()):
        dx, _ = ops.batch_norm_act_backward(p.grad, p.x, p.affine, coefficients, z, None, None, *act, 0)
        grad = p.grad.clone()
        activation = ops.batch_norm_act_backward_(grad, p.x, p.affine, coefficients, z, *act, wants_activation)
        assert torch.equal(grad, dx)
        if wants_activation:
            assert torch.equal(activation, ops.batch_norm_act(p.x, p.affine, None, None, *act))
            assert activation.stride() == p.x.stride()
        else:
            assert activation.shape == (0,)


@pytest.mark.parametrize("act", [RELU, Act(Kind.SILU)], ids=str)
@each_format
def test_an_activation_that_bypasses_the_caches_is_the_forwards(memory_format, act):
    p = problem((2, 64, 256, 256), torch.bfloat16, memory_format)
    coefficients = torch.randn(4, 64)
    dx, _ = ops.batch_norm_act_backward(p.grad, p.x, p.affine, coefficients, None, None, None, *act, 0)
    z = ops.batch_norm_act_backward_(p.grad, p.x, p.affine, coefficients, None, *act, True)
    assert z.nbytes >= 16 << 20
    assert torch.equal(z, ops.batch_norm_act(p.x, p.affine, None, None, *act))
    assert torch.equal(p.grad, dx)


@each_act
@pytest.mark.parametrize(("shape", "channels", "first"), PARTS, ids=str)
@each_format
@each_dtype
def test_a_residual_of_fewer_channels_equals_the_reference(dtype, memory_format, shape, channels, first, act):
    p = problem(shape, dtype, memory_format)
    arguments = (p.x, p.affine, p.part(channels, first), None, *act, first)
    z = ops.batch_norm_act(*arguments)
    assert z.stride() == p.x.stride()
    assert_close(z, reference.batch_norm_act(*arguments))
    z = None if act == NONE else ops.batch_norm_act(*arguments[:4], *source_of_mask(act), first)

    coefficients = torch.randn(4, shape[1], dtype=p.affine.dtype)
    arguments = (p.grad, p.x, p.affine, coefficients, z, None, None, *act, channels, first)
    dx, masked = ops.batch_norm_act_backward(*arguments)
    expected, expected_masked = reference.batch_norm_act_backward(*arguments)
    assert_close(dx, expected)
    assert_close(masked, expected_masked, 0 if act in (NONE, RELU) else 4)
    assert masked.is_contiguous(memory_format=memory_format)


@each_format
def test_a_residual_of_fewer_channels_equals_the_reference_where_outputs_bypass_the_caches(memory_format):
    p = problem((2, 64, 256, 256), torch.bfloat16, memory_format)
    arguments = (p.x, p.affine, p.part(32, 16), None, *RELU, 16)
    z = ops.batch_norm_act(*arguments)
    assert z.nbytes >= 16 << 20
    assert_close(z, reference.batch_norm_act(*arguments))
    arguments = (p.grad, p.x, p.affine, torch.randn(4, 64), z, None, None, *RELU, 32, 16)
    for result, expected in zip(
        ops.batch_norm_act_backward(*arguments), reference.batch_norm_act_backward(*arguments), strict=True
    ):
        assert_close(result, expected)


@pytest.mark.parametrize("branches", [1, 2])
@each_format
@each_dtype
def test_backward_with_fixed_statistics_equals_the_reference(dtype, memory_format, branches):
    p = problem((2, 24, 5, 5), dtype, memory_format)
    fixed = p.affine[:1].contiguous()  # the gradient is a·G
    # one branch's statistics may be fixed and the other's not
    residual = (None, None) if branches == 1 else (p.residual, torch.randn(4, 24, dtype=fixed.dtype))
    arguments = (p.grad, p.x, p.affine, fixed, p.residual, *residual, *RELU, 0)
    for result, expected in zip(
        ops.batch_norm_act_backward(*arguments), reference.batch_norm_act_backward(*arguments), strict=True
    ):
        assert_close(result, expected)


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1)], ids=lambda w: "k{}s{}p{}".format(*w))
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 64, 12, 13), (1, 17, 30, 6)], ids=lambda s: "x".join(map(str, s)))
@each_act
@each_format
@each_dtype
def test_pool_equals_the_reference(dtype, memory_format, act, shape, window):
    p = problem(shape, dtype, memory_format)
    p.x[0, 0, 1, 1] = torch.nan
    geometry = [[value, value] for value in window]
    z, index = ops.batch_norm_act_pool(p.x, p.affine, *act, *geometry)
    assert z.isnan().any()
    assert_close(z, pool_reference.batch_norm_act_pool(p.x, p.affine, *act, *geometry)[0])
    # to the bit what a pool makes of the stored activation, whose ties (at a ReLU's zero) hold the order of the scan
    stored, identity = ops.batch_norm_act(p.x, p.affine, None, None, *act), torch.ones_like(p.affine)
    identity[1] = 0
    expected, expected_index = pool_reference.batch_norm_act_pool(stored, identity, *NONE, *geometry)
    assert_close(z, expected, 0)
    assert torch.equal(index, expected_index)

    grad = torch.randn_like(z.nan_to_num())
    arguments = (grad, index, list(shape[2:]), *geometry)
    assert_close(ops.max_pool_backward(*arguments), pool_reference.max_pool_backward(*arguments))


@pytest.mark.parametrize("offset", [0, 1, 1000])
@each_format
def test_statistics_are_as_accurate_as_stock_where_the_mean_is_far_from_zero(memory_format, offset):
    x = (torch.randn(8, 64, 28, 28) + offset).to(memory_format=memory_format)
    exact = moments_of(x.double())
    mean, var = torch.zeros(64), torch.zeros(64)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    count = x.numel() // 64
    fused, _ = ops.batch_norm_stats(x, None, None, EPS)
    assert_as_accurate_as_stock(
        {"mean": fused[0], "var": fused[1]},
        {"mean": mean, "var": var * ((count - 1) / count)},
        {"mean": exact[0], "var": exact[1]},
    )


@each_shape
@each_format
def test_a_mean_that_is_next_to_zero_is_as_accurate_as_stock(memory_format, shape):
    """What a convolution makes of a normalised input has such means, and no digits of them but those of their sums."""
    x = torch.randn(shape)
    x = (x - x.double().mean((0, 2, 3), keepdim=True).float()).contiguous(memory_format=memory_format)
    stock = torch.zeros(shape[1])
    F.batch_norm(x.contiguous(), stock, torch.ones(shape[1]), training=True, momentum=1.0)
    moments, _ = ops.batch_norm_stats(x, None, None, EPS)
    assert_as_accurate_as_stock({"mean": moments[0]}, {"mean": stock}, {"mean": x.double().mean((0, 2, 3))})


def test_results_do_not_depend_on_the_number_of_threads():
    p = problem((4, 64, 56, 56), torch.float32, torch.channels_last)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums = ops.batch_norm_act_reduce(p.grad, p.x, p.moments, p.affine, None, None, None, *RELU)
            masked = (*ops.masked_grad(p.grad, p.residual), ops.masked_grad_(p.grad.clone(), p.x, p.residual))
            results.append((*ops.batch_norm_stats(p.x, p.weight, p.bias, EPS), sums, *masked))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_format
def test_nan_and_infinity_come_out_where_stock_gives_them(memory_format):
    x = torch.randn(2, 3, 4, 4).to(memory_format=memory_format)
    x[0, 0, 1, 2], x[1, 1, 3, 3] = torch.nan, torch.inf
    stock = F.batch_norm(x, None, None, training=True, eps=EPS).relu()
    moments, affine = ops.batch_norm_stats(x, None, None, EPS)
    assert torch.equal(moments.isnan(), torch.tensor([[True, False, False], [True, True, False], [True, True, False]]))
    assert moments[0, 1] == torch.inf
    z = ops.batch_norm_act(x, affine, None, None, *RELU)
    assert torch.equal(z.isnan(), stock.isnan())


@each_format
def test_an_empty_batch_gives_nan_statistics_and_empty_activations(memory_format):
    p = problem((2, 8, 4, 4), torch.float32, memory_format)
    x = torch.empty(0, 8, 4, 4).to(memory_format=memory_format)
    assert all(result.isnan().all() for result in ops.batch_norm_stats(x, None, None, EPS))
    assert ops.batch_norm_act(x, p.affine, None, None, *RELU).shape == x.shape
    sums = ops.batch_norm_act_reduce(x, x, p.moments, p.affine, None, None, None, *RELU)
    assert torch.equal(sums, torch.zeros(2, 8))
    coefficients = torch.zeros(4, 8)
    dx, _ = ops.batch_norm_act_backward(x, x, p.affine, coefficients, None, None, None, *RELU, 0)
    assert dx.shape == x.shape
    assert ops.batch_norm_act(x, p.affine, x[:, :4], None, *RELU, 2).shape == x.shape
    _, masked = ops.batch_norm_act_backward(x, x, p.affine, coefficients, None, None, None, *RELU, 4, 2)
    assert masked.shape == (0, 4, 4, 4)
    assert ops.batch_norm_act_backward_(x, x, p.affine, coefficients, None, *RELU, True).shape == x.shape
    assert torch.equal(ops.masked_grad_(x, x, x), torch.zeros(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, r"x must have four dimensions \[N, C, H, W\], got 3 dimensions"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.float16)}, r"x must have dtype float32.*got Half"),
        ({"x": torch.zeros(2, 8, 4, 8)[..., ::2]}, r"x must have dense strides.*contiguous\(\)"),
        ({"affine": torch.zeros(2, 7)}, r"affine must have shape \[2, 8\], got \[2, 7\]"),
        ({"affine": torch.zeros(2, 8).double()}, r"affine must have dtype Float, got Double"),
        (
            {"residual": torch.zeros(2, 8, 4, 5)},
            r"residual must have the shape of x, \[2, 8, 4, 4\], got \[2, 8, 4, 5\]",
        ),
        ({"residual": torch.zeros(2, 8, 4, 4).bfloat16()}, r"residual must have dtype Float, got BFloat16"),
        (
            {"residual": torch.zeros(2, 8, 4, 4).to(memory_format=torch.channels_last)},
            r"residual must have the memory format of x, contiguous",
        ),
        ({"residual_affine": torch.zeros(2, 8)}, r"residual_affine must have no value, as residual has"),
        (
            {"residual": torch.zeros(2, 5, 4, 5)},
            r"residual must have the shape of x with fewer channels, \[2, 5, 4, 4\], got \[2, 5, 4, 5\]",
        ),
        (
            {"residual": torch.zeros(2, 9, 4, 4)},
            r"residual must have the shape of x, \[2, 8, 4, 4\], got \[2, 9, 4, 4\]",
        ),
        (
            {"residual": torch.zeros(2, 0, 4, 4)},
            r"residual must have the shape of x, \[2, 8, 4, 4\], got \[2, 0, 4, 4\]",
        ),
        (
            {"residual": torch.zeros(2, 5, 4, 4), "residual_channel": 4},
            "residual_channel must have a value from 0 to 3, got 4",
        ),
        ({"act": 8}, "act must have a value from 0 to 7, got 8"),
        ({"act": -1}, "act must have a value from 0 to 7, got -1"),
        ({"residual_channel": -1}, "residual_channel must have a value from 0 to 0, got -1"),
        (
            {"residual": torch.zeros(2, 5, 4, 4), "residual_affine": torch.zeros(2, 8)},
            r"residual must have the shape of x, \[2, 8, 4, 4\], got \[2, 5, 4, 4\]",
        ),
    ],
)
def test_errors_name_the_argument_what_was_wanted_and_what_came(change, message):
    arguments = {"x": torch.zeros(2, 8, 4, 4), "affine": torch.zeros(2, 8), "residual": None, "residual_affine": None}
    with pytest.raises(RuntimeError, match="fused_resnet::batch_norm_act: " + message):
        ops.batch_norm_act(**{**arguments, "act": 1, "alpha": 0.0, "beta": 0.0, **change})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ((9,), "masked_channels must have a value from 0 to 8, got 9"),
        ((-1,), "masked_channels must have a value from 0 to 8, got -1"),
        ((5, 4), "masked_channel must have a value from 0 to 3, got 4"),
        ((5, -1), "masked_channel must have a value from 0 to 3, got -1"),
    ],
)
def test_masked_channels_that_are_not_there_are_named(part, message):
    x = torch.zeros(2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="fused_resnet::batch_norm_act_backward: " + message):
        ops.batch_norm_act_backward(x, x, torch.zeros(2, 8), torch.zeros(4, 8), None, None, None, *RELU, *part)


def test_a_mask_beside_a_wanted_activation_is_refused():
    x = torch.zeros(2, 8, 4, 4)
    message = "batch_norm_act_backward_: z must have no value where wants_activation is true, got a tensor"
    with pytest.raises(RuntimeError, match=message):
        ops.batch_norm_act_backward_(x, x, torch.zeros(2, 8), torch.zeros(4, 8), x, *RELU, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 4, 4, 4)}, r"z must have the shape of grad, \[2, 8, 4, 4\], got \[2, 4, 4, 4\]"),
        ({"other": torch.zeros(2, 8, 4, 4).bfloat16()}, "other must have dtype Float, got BFloat16"),
        (
            {"other": torch.zeros(2, 8, 4, 4).to(memory_format=torch.channels_last)},
            "other must have the memory format of grad, contiguous",
        ),
    ],
)
def test_what_does_not_fit_a_masked_gradient_is_named(change, message):
    arguments = {"grad": torch.zeros(2, 8, 4, 4), "other": None, "z": torch.zeros(2, 8, 4, 4), **change}
    with pytest.raises(RuntimeError, match="fused_resnet::masked_grad_: " + message):
        ops.masked_grad_(**arguments)


def test_every_instruction_set_gives_the_same_activations():
    """In a process each, since the set is chosen once; sums are in double, so that only contraction may differ."""
    program = (
        "import sys, torch, fused_resnet.ops; from fused_resnet.engines import libraries; libraries.load_cpu_library();"
        "torch.manual_seed(0); x = torch.randn(2, 40, 9, 9).to(memory_format=torch.channels_last);"
        "o = torch.ops.fused_resnet; m, a = o.batch_norm_stats(x, None, None, 1e-5);"
        "r = x[:, :11].clone(memory_format=torch.channels_last);"
        "z = [o.batch_norm_act(x.bfloat16(), a, None, None, 1, 0, 0), o.batch_norm_act(x, a, r, None, 1, 0, 0, 7)];"
        "g = x.bfloat16(); s = o.masked_grad_(g, x.flip(0).bfloat16(), z[0]);"
        "z += [g, o.batch_norm_act_backward_(x.clone(), x, a, a[:1], None, 1, 0, 0, True)];"
        "torch.save((m, *z, s, *o.batch_norm_act_backward(x, x, a, a[:1], z[1], None, None, 1, 0, 0, 11, 7)),"
        " sys.stdout.buffer)"
    )
    native = pytest.importorskip("fused_resnet._C", reason="built without Python's headers")
    results = []
    for isa in native.isas():
        environment = {**os.environ, "FUSED_RESNET_ISA": isa}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
        results.append(torch.load(io.BytesIO(run.stdout)))
    for other in results[1:]:
        for result, expected in zip(other, results[0], strict=True):
            assert_close(result, expected)
