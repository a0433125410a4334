"""The definitions in plain torch, against the mathematics and against stock autograd."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import ops
from fused_resnet.ops import activation
from fused_resnet.ops.activation import EXAMPLES, NONE, RELU, Kind
from fused_resnet.ops.batch_norm_act import reference as bna
from fused_resnet.ops.batch_norm_act_pool import reference as pool

EPS = 1e-5

each_act = pytest.mark.parametrize("act", EXAMPLES, ids=str)


# a kind's stock function, with the constants of EXAMPLES
STOCK = {
    Kind.NONE: lambda v: v,
    Kind.RELU: F.relu,
    Kind.LEAKY_RELU: partial(F.leaky_relu, negative_slope=0.1),
    Kind.HARDTANH: partial(F.hardtanh, min_val=-1, max_val=2),
    Kind.SILU: F.silu,
    Kind.HARDSWISH: F.hardswish,
    Kind.GELU: F.gelu,
    Kind.GELU_TANH: partial(F.gelu, approximate="tanh"),
}


def test_there_is_an_example_of_every_kind():
    assert [Kind(act.kind) for act in EXAMPLES] == list(Kind) == list(STOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_act
def test_an_activation_and_its_gradient_are_stocks(act, dtype):
    """Also where the gradient jumps, and far out; many numbers and few take stock's vector and scalar code."""
    kinks = torch.tensor([0.0, -0.0, -1, 2, -3, 3, -1e10, 1e10])
    for v in (torch.cat((kinks, 3 * torch.randn(1000))), kinks[:5]):
        v, grad = v.to(dtype).requires_grad_(), torch.randn(v.shape, dtype=dtype)
        z = STOCK[act.kind](v)
        assert torch.equal(activation.value(act, v), z)
        torch.testing.assert_close(activation.gradient(act, grad, v.detach()), torch.autograd.grad(z, v, grad)[0])


# by the docstring, v to the gradient there
KINKS = {
    Kind.RELU: {0: 0},
    Kind.LEAKY_RELU: {0: 0.1},
    Kind.HARDTANH: {-1: 0, 2: 0},
    Kind.HARDSWISH: {-3: 0, 3: 1},
}


@pytest.mark.parametrize("kind", KINKS, ids=lambda kind: kind.name.lower())
def test_a_gradient_that_jumps_has_stocks_value_there(kind):
    for place, wanted in KINKS[kind].items():
        for count in (1, 64):  # stock's scalar code, and its vector code
            v = torch.full((count,), float(place), requires_grad=True)
            expected = torch.full((count,), float(wanted))
            stock = torch.autograd.grad(STOCK[kind](v).sum(), v)[0]
            torch.testing.assert_close(stock, expected)
            torch.testing.assert_close(activation.gradient(EXAMPLES[kind], torch.ones(count), v.detach()), expected)


@each_act
def test_nan_stays_nan(act):
    assert activation.value(act, torch.full((64,), torch.nan)).isnan().all()


@pytest.fixture
def x():
    return torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + 1


@pytest.fixture
def weight():
    return torch.tensor([1.5, -0.5, 0.0, 1.0], dtype=torch.float64)


@pytest.fixture
def bias():
    return torch.randn(4, dtype=torch.float64)


def moments_of(x):
    return bna.batch_norm_stats(x, None, None, EPS)[0]


def test_stats_are_the_mean_and_both_variances(x, weight, bias):
    moments, affine = bna.batch_norm_stats(x, weight, bias, EPS)
    mean, biased, unbiased = moments
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(biased, x.var((0, 2, 3), correction=0))
    torch.testing.assert_close(unbiased, x.var((0, 2, 3), correction=1))
    assert torch.equal(affine, bna.batch_norm_affine(moments, weight, bias, EPS))


def test_merged_parts_have_the_statistics_of_the_whole(x, weight, bias):
    parts = []
    for images in x.split((2, 0, 1)):
        count = images.numel() // 4
        mean, var, _ = moments_of(images) if count else torch.zeros(3, 4, dtype=x.dtype)
        parts.append(torch.cat((mean, var * count, mean.new_full((1,), count))))
    merged, expected = (
        bna.batch_norm_merge(torch.stack(parts), weight, bias, EPS),
        bna.batch_norm_stats(x, weight, bias, EPS),
    )
    torch.testing.assert_close(merged, expected)


def test_parts_that_are_all_empty_merge_to_no_nan(weight, bias):
    moments, affine = bna.batch_norm_merge(torch.zeros(2, 9), weight, bias, EPS)
    assert not moments.any()
    assert affine.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_per_channel_results_are_float32(x, dtype):
    moments = moments_of(x.to(dtype))
    affine = bna.batch_norm_affine(moments, None, None, EPS)
    assert moments.dtype == affine.dtype == torch.float32
    assert bna.batch_norm_act(x.to(dtype), affine, None, None, *RELU).dtype == dtype


@each_act
def test_affine_and_act_are_batch_norm_and_the_activation(x, weight, bias, act):
    affine = bna.batch_norm_affine(moments_of(x), weight, bias, EPS)
    expected = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    stock = STOCK[act.kind]
    torch.testing.assert_close(bna.batch_norm_act(x, affine, None, None, *act), stock(expected))
    torch.testing.assert_close(bna.batch_norm_act(x, affine, x, None, *act), stock(expected + x))
    torch.testing.assert_close(bna.batch_norm_act(x, affine, x, affine, *act), stock(2 * expected))


@pytest.mark.parametrize("batch_stats", [True, False])
@each_act
def test_the_two_backward_passes_are_autograds_gradients(x, weight, bias, act, batch_stats):
    moments = moments_of(x)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    mean, var = (None, None) if batch_stats else moments[:2]
    v = F.batch_norm(leaves[0], mean, var, *leaves[1:], batch_stats, 0.0, EPS)
    z = STOCK[act.kind](v)
    grad = torch.randn_like(z)
    expected_masked, *expected = torch.autograd.grad(z, (v, *leaves), grad)

    affine = bna.batch_norm_affine(moments, weight, bias, EPS)
    for saved in (None, v.detach(), *([z.detach()] if act == RELU else [])):  # a ReLU's output serves, too
        sums = bna.batch_norm_act_reduce(grad, x, moments, affine, saved, None, None, *act)
        count = x.numel() // x.shape[1]
        *gradients, coefficients = bna.batch_norm_coefficients(sums, 0, moments, weight, EPS, count, batch_stats)
        dx, masked = bna.batch_norm_act_backward(grad, x, affine, coefficients, saved, None, None, *act, 4)
        torch.testing.assert_close(masked, expected_masked)
        in_place = grad.clone()
        activation = bna.batch_norm_act_backward_(in_place, x, affine, coefficients, saved, *act, saved is None)
        assert torch.equal(in_place, dx)
        torch.testing.assert_close(activation, z.detach() if saved is None else z.new_empty(0))
        for got, wanted in zip((dx, *gradients), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_an_activation_is_not_made_beside_a_mask_by_another(x):
    affine = torch.ones(2, 4, dtype=x.dtype)
    with pytest.raises(ValueError, match="z must be None where wants_activation is true, got a tensor"):
        bna.batch_norm_act_backward_(x.clone(), x, affine, affine[:1], x, *RELU, True)


def test_a_second_branch_gets_its_own_sums_and_gradient(x, weight, bias):
    r = torch.randn_like(x)
    moments, moments_r = moments_of(x), moments_of(r)
    leaves = [t.clone().requires_grad_() for t in (x, r)]
    norm = [F.batch_norm(t, None, None, weight, bias, True, 0.0, EPS) for t in leaves]
    z = (norm[0] + norm[1]).relu()
    grad = torch.randn_like(z)
    expected = torch.autograd.grad(z, leaves, grad)

    affine = bna.batch_norm_affine(moments, weight, bias, EPS)
    sums = bna.batch_norm_act_reduce(grad, x, moments, affine, z.detach(), r, moments_r, *RELU)
    assert sums.shape == (4, 4)
    count = x.numel() // x.shape[1]
    coefficients = [
        bna.batch_norm_coefficients(sums, branch, m, weight, EPS, count, True)[2]
        for branch, m in enumerate((moments, moments_r))
    ]
    got = bna.batch_norm_act_backward(grad, x, affine, coefficients[0], z.detach(), r, coefficients[1], *RELU, 0)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("channels", "first"), [(1, 0), (2, 1), (3, 1), (4, 0)])
def test_a_residual_of_fewer_channels_is_padded_by_zeros(x, weight, bias, channels, first):
    moments = moments_of(x)
    affine = bna.batch_norm_affine(moments, weight, bias, EPS)
    leaves = [t.clone().requires_grad_() for t in (x, torch.randn(3, channels, 5, 6, dtype=torch.float64))]
    padded = F.pad(leaves[1], (0, 0, 0, 0, first, 4 - first - channels))
    expected = (F.batch_norm(leaves[0], None, None, weight, bias, True, 0.0, EPS) + padded).relu()
    z = bna.batch_norm_act(x, affine, leaves[1].detach(), None, *RELU, first)
    torch.testing.assert_close(z, expected)

    grad = torch.randn_like(z)
    sums = bna.batch_norm_act_reduce(grad, x, moments, affine, z, None, None, *RELU)
    *_, coefficients = bna.batch_norm_coefficients(sums, 0, moments, weight, EPS, 90, True)
    got = bna.batch_norm_act_backward(grad, x, affine, coefficients, z, None, None, *RELU, channels, first)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, grad))
    assert got[1].is_contiguous()


def test_the_masked_gradient_of_a_sum_is_autograds_behind_a_relu(x):
    leaf, shift = x.clone().requires_grad_(), torch.zeros(1, 4, 1, 1, dtype=x.dtype, requires_grad=True)
    z = (leaf + shift).relu()
    grad, other = torch.randn(2, *x.shape, dtype=x.dtype)
    expected = torch.autograd.grad(z, (leaf, shift), grad + other)
    sums = bna.masked_grad_(grad, other, z.detach())
    torch.testing.assert_close((grad, sums.view(1, 4, 1, 1)), expected)


POOLS = [([3, 3], [2, 2], [1, 1]), ([2, 2], [2, 2], [0, 0]), ([2, 3], [1, 2], [1, 0]), ([3, 3], [1, 1], [1, 1])]


@each_act
@pytest.mark.parametrize("geometry", POOLS, ids=str)
def test_the_pool_is_stocks_and_so_is_its_gradient(x, weight, bias, geometry, act):
    affine = bna.batch_norm_affine(moments_of(x), weight, bias, EPS)
    z = bna.batch_norm_act(x, affine, None, None, *act).requires_grad_()
    expected = F.max_pool2d(z, *geometry)
    got, index = pool.batch_norm_act_pool(x, affine, *act, *geometry)
    assert torch.equal(got, expected)
    assert index.dtype == torch.uint8
    assert index.shape == got.shape
    grad = torch.randn_like(got)
    dz = pool.max_pool_backward(grad, index, x.shape[2:], *geometry)
    torch.testing.assert_close(dz, torch.autograd.grad(expected, z, grad)[0])


def test_the_pool_lets_nan_through_and_gives_it_the_gradient():
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 2] = float("nan")
    affine = torch.tensor([[1.0], [0.0]])
    z, index = pool.batch_norm_act_pool(x, affine, *RELU, [2, 2], [2, 2], [0, 0])
    assert torch.equal(z.isnan(), torch.tensor([[[[False, True], [False, False]]]]))
    dx = pool.max_pool_backward(torch.ones_like(z), index, [4, 4], [2, 2], [2, 2], [0, 0])
    assert dx[0, 0, 1, 2] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_fakes_have_the_references_shapes_dtypes_and_strides(x, layout, dtype):
    x = x.to(dtype).contiguous(memory_format=layout)
    moments = moments_of(x)
    affine = bna.batch_norm_affine(moments, None, None, EPS)
    grad = torch.ones_like(x)
    sums = bna.batch_norm_act_reduce(grad, x, moments, affine, None, None, None, *RELU)
    coefficients, frozen = (
        bna.batch_norm_coefficients(sums, 0, moments, None, EPS, 90, stats)[2] for stats in (True, False)
    )
    z, index = pool.batch_norm_act_pool(x, affine, *RELU, *POOLS[0])
    parts = torch.cat((moments[:2].flatten(), moments.new_full((1,), 90.0))).repeat(3, 1)
    calls = {
        "batch_norm_stats": [(x, None, None, EPS), (x, affine[0], affine[1], EPS)],
        "batch_norm_merge": [(parts, None, None, EPS), (parts, affine[0], affine[1], EPS)],
        "batch_norm_affine": [(moments, None, None, EPS), (moments, affine[0], affine[1], EPS)],
        "batch_norm_act": [
            (x, affine, None, None, *RELU), (x, affine, x, None, *NONE), (x, affine, x, affine, *RELU),
            (x, affine, x[:, 1:3].contiguous(memory_format=layout), None, *RELU, 1),
            *((x, affine, None, None, *act) for act in EXAMPLES),
        ],
        "batch_norm_act_": [(x.clone(), affine, None, None, *RELU), (x.clone(), affine, x, affine, *RELU)],
        "batch_norm_act_reduce": [
            (grad, x, moments, affine, None, None, None, *RELU),
            (grad, x, moments, affine, x, x.clone(), moments, *NONE),
        ],
        "batch_norm_coefficients": [(sums, 0, moments, None, EPS, 90, stats) for stats in (True, False)],
        "batch_norm_act_backward": [
            (grad, x, affine, c, None, None, None, *act, masked)
            for c, act, masked in itertools.product((coefficients, frozen), (RELU, NONE), (0, 2, 4))
        ] + [(grad, x, affine, coefficients, x, x.clone(), coefficients, *RELU, 0)],
        "batch_norm_act_backward_": [
            (grad.clone(), x, affine, c, z, *act, wants)
            for c in (coefficients, frozen) for act in (RELU, NONE)
            for z, wants in ((None, True), (None, False), (x.clone(), False))
        ],
        "update_running_stats_": [
            ([moments[0].clone()], [moments[1].clone()], [torch.tensor(3)], [moments], momentum)
            for momentum in (0.1, None)
        ],
        "masked_grad": [(grad, x)],
        "masked_grad_": [(grad.clone(), None, x), (grad.clone(), x, x.clone())],
        "add_masked_": [(x.clone(), grad, x), (x.clone(), grad, None)],
        "batch_norm_act_pool": [(x, affine, *RELU, *POOLS[0])],
        "max_pool_backward": [(torch.ones_like(z), index, list(x.shape[2:]), *POOLS[0])],
    }  # fmt: skip
    assert set(calls) == {name for folder in ops.FOLDERS for name in folder.OPERATIONS}
    for name, arguments in calls.items():
        for args in arguments:
            operation = getattr(torch.ops.fused_resnet, name).default
            torch.library.opcheck(operation, args, test_utils=("test_schema", "test_faketensor"))
