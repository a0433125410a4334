"""The native CUDA kernels beside the reference, operation by operation, and their sums beside float64.

Where there is no GPU, ``tests/building/test_cuda_emulation.py`` runs this page on the kernels' source compiled for the
CPU.
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.engines import libraries
from fused_resnet.ops.activation import NONE, RELU, Act, Kind, gradient, value
from fused_resnet.ops.batch_norm_act import reference
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.activations import (
    SPECIAL,
    assert_gradient_close,
    assert_special_values,
    drop_kinks,
    each_act,
    each_act_and_source,
    source_of_mask,
)
from tests.support.problem import EPS, PARTS, Problem, assert_close, moments_of

EMULATED = os.environ.get("FUSED_RESNET_CUDA_EMULATION")
if EMULATED:
    torch.ops.load_library(EMULATED)
    WHY_NOT = None
else:
    WHY_NOT = libraries.load_cuda_library()

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

ops = torch.ops.fused_resnet

DEVICE = "cpu" if EMULATED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# channels that no vector divides, one element, one row, a block's last threads idle (24), several tiles of channels,
# the last of them cut short (1032, 2056), rows that leave some threads one less
SHAPES = [
    (2, 3, 5, 7),
    (2, 16, 8, 8),
    (5, 513, 1, 1),
    (1, 1, 1, 1),
    (1, 1, 90, 90),
    (1, 40, 1, 1),
    (2, 24, 1, 11),
    (1, 1032, 5, 5),
    (2, 64, 40, 39),
    (3, 2056, 2, 3),
]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def image_of(shape, dtype, offset=0):
    """Random values in channels_last, from ``offset`` elements into their memory."""
    _, c, h, w = shape
    values = torch.randn(shape, dtype=torch.float64).add(0.5).to(dtype)
    memory = torch.empty(values.numel() + offset, dtype=dtype, device=DEVICE)
    return memory.as_strided(shape, (c * h * w, 1, w * c, c), offset).copy_(values)


def problem(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Problem:
    return Problem(*(image_of(shape, dtype, offset) for _ in range(3)))


def preactivation_of(p):
    return torch.addcmul(p.affine[1].view(1, -1, 1, 1), p.x.float(), p.affine[0].view(1, -1, 1, 1))


def check_statistics(p):
    moments, affine = ops.batch_norm_stats(p.x, p.weight, p.bias, EPS)
    assert_close(moments, moments_of(p.x.double()).float(), 16)
    assert torch.equal(affine, ops.batch_norm_affine(moments, p.weight, p.bias, EPS))


def check_apply(p, act, branch):
    residual = None if branch == "no residual" else p.residual
    residual_affine = p.residual_affine if branch == "second branch" else None
    arguments = (p.x, p.affine, residual, residual_affine, *act)
    z = ops.batch_norm_act(*arguments)
    assert z.stride() == p.x.stride()
    assert_close(z, reference.batch_norm_act(*arguments))
    ops.batch_norm_act_(*arguments)
    assert torch.equal(p.x, z)


def check_backward(p, branches, act, source, write_masked):
    z = reference.batch_norm_act(p.x, p.affine, p.residual, None, *source_of_mask(act)) if source == "z" else None
    residual, moments = (p.residual, p.residual_moments) if branches == 2 else (None, None)
    drop_kinks(p.grad, act, preactivation_of(p))

    arguments = (p.grad, p.x, p.moments, p.affine, z, residual, moments, *act)
    sums = ops.batch_norm_act_reduce(*arguments)
    exact = [t.double() if isinstance(t, Tensor) else t for t in arguments]
    assert_close(sums, reference.batch_norm_act_reduce(*exact).float(), 16)

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
    if branches == 1:
        check_backward_in_place(p, coefficients, z, act)


def check_backward_in_place(p, coefficients, z, act):
    dx, _ = ops.batch_norm_act_backward(p.grad, p.x, p.affine, coefficients, z, None, None, *act, 0)
    for wants_activation in (False,) if z is not None else (True, False):
        grad = p.grad.clone()
        activation = ops.batch_norm_act_backward_(grad, p.x, p.affine, coefficients, z, *act, wants_activation)
        assert torch.equal(grad, dx)
        if wants_activation:
            assert torch.equal(activation, ops.batch_norm_act(p.x, p.affine, None, None, *act))
            assert activation.stride() == p.x.stride()
        else:
            assert activation.shape == (0,)


def check_masked_grad(p):
    z = p.residual.relu()
    z[0, 0, 0, 0] = torch.nan  # where it passes, as in stock
    masked, sums = ops.masked_grad(p.grad, z)
    expected, _ = reference.masked_grad(p.grad, z)
    assert torch.equal(masked, expected)
    assert masked.stride() == p.grad.stride()
    assert_close(sums, expected.double().sum((0, 2, 3)).float(), 16)
    for other in (None, p.x):
        in_place, expected = p.grad.clone(), p.grad.clone()
        reference.masked_grad_(expected, other, z)
        sums = ops.masked_grad_(in_place, other, z)
        assert torch.equal(in_place, expected)
        assert_close(sums, expected.double().sum((0, 2, 3)).float(), 16)


def check_part(p, channels, first, act, source):
    drop_kinks(p.grad, act, preactivation_of(p))
    arguments = (p.x, p.affine, p.part(channels, first), None, *act, first)
    z = ops.batch_norm_act(*arguments)
    assert z.stride() == p.x.stride()
    assert_close(z, reference.batch_norm_act(*arguments))

    coefficients = torch.randn(4, p.x.shape[1], device=DEVICE)
    z = ops.batch_norm_act(*arguments[:4], *source_of_mask(act), first) if source == "z" else None
    arguments = (p.grad, p.x, p.affine, coefficients, z, None, None, *act, channels, first)
    dx, masked = ops.batch_norm_act_backward(*arguments)
    expected, expected_masked = reference.batch_norm_act_backward(*arguments)
    assert_close(dx, expected)
    assert_close(masked, expected_masked, 0 if act in (NONE, RELU) else 4)
    assert masked.is_contiguous(memory_format=torch.channels_last)


@each_shape
@each_dtype
def test_statistics_equal_the_reference(dtype, shape):
    check_statistics(problem(shape, dtype))


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_per_channel_steps_equal_the_reference_for_parameters_of_any_dtype(parameter_dtype):
    p = problem((2, 200, 5, 5), torch.float32)
    weight = p.weight.to(parameter_dtype)
    bias = torch.stack((p.bias, p.bias), dim=1).to(parameter_dtype)[:, 1]  # every second element
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


@pytest.mark.parametrize("branch", ["no residual", "residual", "second branch"])
@each_act
@each_shape
@each_dtype
def test_apply_equals_the_reference(dtype, shape, act, branch):
    check_apply(problem(shape, dtype), act, branch)


@pytest.mark.parametrize("write_masked", [True, False], ids=["masked", "dx only"])
@each_act_and_source
@pytest.mark.parametrize("branches", [1, 2])
@each_shape
@each_dtype
def test_backward_equals_the_reference(dtype, shape, branches, act, source, write_masked):
    check_backward(problem(shape, dtype), branches, act, source, write_masked)


@each_act_and_source
@pytest.mark.parametrize(("shape", "channels", "first"), PARTS, ids=str)
@each_dtype
def test_a_residual_of_fewer_channels_equals_the_reference(dtype, shape, channels, first, act, source):
    check_part(problem(shape, dtype), channels, first, act, source)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("act", "source"), [(NONE, "x"), (RELU, "x"), (RELU, "z")], ids=str)
@each_dtype
def test_backward_with_fixed_statistics_equals_the_reference(dtype, act, source, branches):
    p = problem((2, 24, 5, 5), dtype)
    p.x[0, 0, 0, 0] = torch.inf  # a·G does not see x
    fixed = p.affine[:1].contiguous()
    # one branch's statistics may be fixed and the other's not
    residual = (None, None) if branches == 1 else (p.residual, torch.randn(4, 24, device=DEVICE))
    z = p.residual if source == "z" else None
    arguments = (p.grad, p.x, p.affine, fixed, z, *residual, *act, 0)
    for result, expected in zip(
        ops.batch_norm_act_backward(*arguments), reference.batch_norm_act_backward(*arguments), strict=True
    ):
        assert_close(result, expected)
    if branches == 1:
        check_backward_in_place(p, fixed, z, act)


@each_shape
@each_dtype
def test_the_masked_gradient_and_its_sum_equal_the_reference(dtype, shape):
    check_masked_grad(problem(shape, dtype))


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@each_shape
@each_dtype
def test_adding_the_shortcut_equals_the_reference(dtype, shape, masked):
    p = problem(shape, dtype)
    expected, z = p.x.clone(), p.residual if masked else None
    reference.add_masked_(expected, p.grad, z)
    ops.add_masked_(p.x, p.grad, z)
    assert_close(p.x, expected)


@pytest.mark.parametrize("act", [RELU, Act(Kind.GELU)], ids=str)
@each_dtype
def test_addresses_that_no_wide_access_allows(dtype, act):
    p = problem((2, 64, 9, 9), dtype, offset=1)
    check_statistics(p)
    check_masked_grad(p)
    check_backward(p, 1, act, "x", True)
    check_part(p, 32, 16, act, "z")
    check_apply(p, act, "second branch")
    ops.add_masked_(p.x, p.grad, None)


@pytest.mark.parametrize("offset", [0, 1, 1000])
def test_statistics_are_as_accurate_as_stock_where_the_mean_is_far_from_zero(offset):
    x = (torch.randn(8, 64, 28, 28) + offset).to(DEVICE, memory_format=torch.channels_last)
    exact = moments_of(x.double())
    mean, var = torch.zeros(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    count = x.numel() // 64
    fused, _ = ops.batch_norm_stats(x, None, None, EPS)
    assert_as_accurate_as_stock(
        {"mean": fused[0], "var": fused[1]},
        {"mean": mean, "var": var * ((count - 1) / count)},
        {"mean": exact[0], "var": exact[1]},
    )


def test_an_outlier_among_the_first_values_does_not_cost_the_variance_its_digits():
    x = torch.randn(8, 64, 28, 28)
    x[0, :, 0, 0] = x[-1, :, -1, -1] = 1e3
    x = x.to(DEVICE, memory_format=torch.channels_last)
    assert_close(ops.batch_norm_stats(x, None, None, EPS)[0], moments_of(x.double()).float(), 100)


def test_results_are_the_same_every_time():
    p = problem((4, 64, 56, 56), torch.float32)
    results = [
        (
            *ops.batch_norm_stats(p.x, p.weight, p.bias, EPS),
            ops.batch_norm_act_reduce(p.grad, p.x, p.moments, p.affine, None, None, None, *RELU),
            *ops.masked_grad(p.grad, p.residual),
            ops.masked_grad_(p.grad.clone(), p.x, p.residual),
        )
        for _ in range(3)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_dtype
def test_nan_and_infinity_come_out_where_stock_gives_them(dtype):
    x = torch.randn(2, 3, 4, 4).to(DEVICE, dtype, memory_format=torch.channels_last)
    x[0, 0, 1, 2], x[1, 1, 3, 3] = torch.nan, torch.inf
    moments, affine = ops.batch_norm_stats(x, None, None, EPS)
    stock = F.batch_norm(x.float(), None, None, training=True, eps=EPS).relu()
    finite = [[True, False, False], [True, True, False], [True, True, False]]
    assert moments.isnan().tolist() == finite
    assert moments[0, 1] == torch.inf
    assert torch.equal(ops.batch_norm_act(x, affine, None, None, *RELU).isnan(), stock.isnan())
    # the sign of NaN masks nothing
    grad = torch.ones_like(x)
    dx = grad.clone()
    ops.add_masked_(dx, grad, x)
    assert dx[0, 0, 1, 2] == 2
    sums = ops.batch_norm_act_reduce(grad, x, moments, affine, x, None, None, *RELU)
    assert torch.equal(sums[0], (~(x <= 0)).sum((0, 2, 3)).float())


@each_act
@each_dtype
def test_special_values_are_those_of_float64(dtype, act):
    v = SPECIAL.to(DEVICE, dtype)
    x = v.view(-1, 1, 1, 1).expand(-1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    affine = torch.tensor([1.0, -0.0], device=DEVICE)[:, None].repeat(1, 8)  # leaves the sign of a zero
    z = ops.batch_norm_act(x, affine, None, None, *act)
    arguments = (torch.ones_like(x), x, affine, affine[:1])
    gradients = [ops.batch_norm_act_backward(*arguments, y, None, None, *act, 8)[1][:, 0, 0, 0] for y in (None, x)]
    assert_special_values(act, v, z[:, 0, 0, 0], gradients)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@each_act
def test_value_and_gradient_are_as_accurate_as_stock(act, scale):
    x = image_of((2, 64, 20, 20), torch.float32) * scale
    affine = torch.stack((torch.ones(64), torch.zeros(64))).to(DEVICE)
    exact = {"value": value(act, x.double()), "gradient": gradient(act, torch.ones_like(x).double(), x.double())}
    stock = {"value": value(act, x), "gradient": gradient(act, torch.ones_like(x), x)}
    _, masked = ops.batch_norm_act_backward(torch.ones_like(x), x, affine, affine[:1], None, None, None, *act, 64)
    fused = {"value": ops.batch_norm_act(x, affine, None, None, *act), "gradient": masked}
    assert_as_accurate_as_stock(fused, stock, exact)


def test_an_empty_batch_gives_nan_statistics_and_empty_activations():
    p = problem((2, 8, 4, 4), torch.float32)
    x = torch.empty(0, 8, 4, 4, device=DEVICE)
    assert all(result.isnan().all() for result in ops.batch_norm_stats(x, None, None, EPS))
    assert ops.batch_norm_act(x, p.affine, x, p.affine, *RELU).shape == x.shape
    ops.batch_norm_act_(x, p.affine, x, p.affine, *RELU)
    sums = ops.batch_norm_act_reduce(x, x, p.moments, p.affine, None, None, None, *RELU)
    assert torch.equal(sums, torch.zeros(2, 8, device=DEVICE))
    sums = ops.batch_norm_act_reduce(x, x, p.moments, p.affine, x, x, p.moments, *RELU)
    assert torch.equal(sums, torch.zeros(4, 8, device=DEVICE))
    coefficients = torch.zeros(4, 8, device=DEVICE)
    dx, _ = ops.batch_norm_act_backward(x, x, p.affine, coefficients, None, x, coefficients, *RELU, 0)
    assert dx.shape == x.shape
    assert ops.batch_norm_act(x, p.affine, x[:, :4], None, *RELU, 2).shape == x.shape
    _, masked = ops.batch_norm_act_backward(x, x, p.affine, coefficients, None, None, None, *RELU, 4, 2)
    assert masked.shape == (0, 4, 4, 4)
    assert ops.batch_norm_act_backward_(x, x, p.affine, coefficients, None, *RELU, True).shape == x.shape
    ops.add_masked_(x, x, x)
    masked, sums = ops.masked_grad(x, x)
    assert masked.shape == x.shape
    assert torch.equal(sums, torch.zeros(8, device=DEVICE))
    assert torch.equal(ops.masked_grad_(x, x, x), torch.zeros(8, device=DEVICE))
    nothing = torch.empty(2, 0, 4, 4, device=DEVICE)
    assert ops.batch_norm_stats(nothing, None, None, EPS)[0].shape == (3, 0)
    assert ops.masked_grad(nothing, nothing)[1].shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": 8}, "act must have a value from 0 to 7, got 8"),
        ({"x": torch.zeros(2, 8, 4)}, r"x must have four dimensions \[N, C, H, W\], got 3 dimensions"),
        ({"x": torch.zeros(2, 8, 4, 4).double()}, r"x must have dtype float32, bfloat16 or float16, got Double"),
        (
            {"x": torch.zeros(2, 8, 4, 4)},
            r"x must have channels_last strides.*call .contiguous\(memory_format=torch.channels_last\) first",
        ),
        ({"affine": torch.zeros(2, 7)}, r"affine must have shape \[2, 8\], got \[2, 7\]"),
        ({"residual": torch.zeros(2, 8, 4, 4)}, r"residual must have the memory format of x, channels_last"),
        ({"residual_affine": torch.zeros(2, 8)}, r"residual_affine must have no value, as residual has"),
        (
            {"residual": torch.zeros(2, 5, 4, 4).to(memory_format=torch.channels_last), "residual_channel": 4},
            "residual_channel must have a value from 0 to 3, got 4",
        ),
    ],
)
def test_errors_name_the_argument_what_was_wanted_and_what_came(change, message):
    x = torch.zeros(2, 8, 4, 4).to(memory_format=torch.channels_last)
    arguments = {"x": x, "affine": torch.zeros(2, 8), "residual": None, "residual_affine": None, **change}
    arguments = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in arguments.items()}
    with pytest.raises(RuntimeError, match="fused_resnet::batch_norm_act: " + message):
        ops.batch_norm_act(**{"act": 1, "alpha": 0.0, "beta": 0.0, **arguments})


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(2, 8, 4, 4), "z must have the memory format of grad, channels_last"),
        (torch.zeros(2, 4, 4, 4), r"z must have the shape of grad, \[2, 8, 4, 4\], got \[2, 4, 4, 4\]"),
        (torch.zeros(2, 8, 4, 4).half(), "z must have dtype Float, got Half"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(z, message):
    grad = torch.zeros(2, 8, 4, 4).to(DEVICE, memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="fused_resnet::masked_grad: " + message):
        ops.masked_grad(grad, z.to(DEVICE))
    with pytest.raises(RuntimeError, match="fused_resnet::masked_grad_: " + message.replace("z", "other", 1)):
        ops.masked_grad_(grad, z.to(DEVICE), grad)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a second device")
def test_tensors_on_different_devices_are_refused():
    x = torch.zeros(2, 8, 4, 4, device=DEVICE).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="affine must have device cuda:0, got cpu"):
        ops.batch_norm_act(x, torch.zeros(2, 8), None, None, *RELU)
    with pytest.raises(RuntimeError, match="x must have the device of the other tensors, got cpu"):
        ops.batch_norm_act(x.cpu(), torch.zeros(2, 8, device=DEVICE), None, None, *RELU)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's memory")
def test_more_elements_than_32_bits_count():
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.bfloat16, device=DEVICE).expand(3, 64, 4096, 4096)
    x = x.contiguous(memory_format=torch.channels_last)
    x[-1, :, -1, -1] = -1
    moments, affine = ops.batch_norm_stats(x, None, None, EPS)
    assert_close(moments[0], torch.full((64,), 3.0, device=DEVICE))
    affine = torch.stack((torch.ones_like(affine[0]), torch.zeros_like(affine[0])))
    z = ops.batch_norm_act(x, affine, None, None, *RELU)
    assert z[-1, :, -1, -1].eq(0).all()
    assert z[-1, :, -1, -2].eq(3).all()
    assert z[0, :, 0, 0].eq(3).all()
    masked, sums = ops.masked_grad(x, z)
    assert torch.equal(masked, z)
    assert_close(sums, torch.full((64,), 3.0 * (x[:, 0].numel() - 1), device=DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_every_operation_can_be_captured():
    p = problem((2, 64, 9, 9), torch.bfloat16)

    def step():
        moments, affine = ops.batch_norm_stats(p.x, p.weight, p.bias, EPS)
        z = ops.batch_norm_act(p.x, affine, p.residual, None, *RELU)
        sums = ops.batch_norm_act_reduce(p.grad, p.x, moments, affine, z, None, None, *RELU)
        *_, coefficients = ops.batch_norm_coefficients(sums, 0, moments, p.weight, EPS, p.count, True)
        dx, _ = ops.batch_norm_act_backward(p.grad, p.x, affine, coefficients, z, None, None, *RELU, 64)
        ops.add_masked_(dx, p.grad, z)
        masked, sum_grad = ops.masked_grad(p.grad, z)
        ops.masked_grad_(masked, p.residual, z)
        dx = ops.batch_norm_act_backward_(dx, p.x, affine, coefficients, None, *RELU, True)
        ops.batch_norm_act_(masked, affine, p.residual, None, *RELU)
        return z, dx, masked, sum_grad

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
