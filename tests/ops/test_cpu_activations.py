"""The activations of the native CPU kernels beside stock's and float64: accuracy, special values, tails, refusals."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.engines import libraries
from fused_resnet.ops.activation import EXAMPLES, NONE, Act, Kind, gradient, value
from fused_resnet.ops.library import accumulation_dtype
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.activations import SPECIAL, assert_special_values, each_act
from tests.support.problem import EPS

pytestmark = pytest.mark.skipif(libraries.load_cpu_library() is not None, reason=str(libraries.load_cpu_library()))

ops = torch.ops.fused_resnet

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d).removeprefix("torch.")
)
each_format = pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"]
)
# whole vectors, a tail, several chunks and a tail
LENGTHS = [*range(1, 36), 63, 64, 65, 511, 512, 513, 1030]


def identity(dtype: torch.dtype, channels: int = 1) -> Tensor:
    """Coefficients of a batch norm that changes nothing, the sign of a zero included."""
    return torch.tensor([1.0, -0.0], dtype=accumulation_dtype(dtype))[:, None].repeat(1, channels)


def value_of(act: Act, v: Tensor) -> Tensor:
    return ops.batch_norm_act(v.view(1, 1, 1, -1), identity(v.dtype), None, None, *act).flatten()


def gradients_of(act: Act, v: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by the value that a·x + b has, and by that of a tensor."""
    x, affine = v.view(1, 1, 1, -1), identity(v.dtype)
    results = []
    for z in (None, x):
        _, masked = ops.batch_norm_act_backward(torch.ones_like(x), x, affine, affine[:1], z, None, None, *act, 1)
        results.append(masked.flatten())
    return results[0], results[1]


def test_no_activation_has_a_z_to_look_at():
    grad, z = torch.randn(2, 3, 4, 4), torch.full((2, 3, 4, 4), torch.nan)
    affine = identity(grad.dtype, 3)
    _, masked = ops.batch_norm_act_backward(grad, z, affine, affine[:1], z, None, None, *NONE, 3)
    assert torch.equal(masked, grad)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_format
@each_act
def test_a_step_is_as_accurate_as_stock(act, memory_format, dtype, scale):
    x, grad = (torch.randn(4, 24, 13, 11).to(dtype).to(memory_format=memory_format) for _ in range(2))
    weight, bias = torch.rand(24) * scale, torch.randn(24)

    def stock(dtype: torch.dtype) -> dict[str, Tensor | None]:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        leaf, parameters = x.clone().to(dtype).requires_grad_(), [weight.to(wide), bias.to(wide)]
        z = value(act, F.batch_norm(leaf, None, None, *parameters, training=True, eps=EPS))
        z.backward(grad.to(dtype))
        return {"z": z.detach(), "dx": leaf.grad}

    moments, affine = ops.batch_norm_stats(x, weight, bias, EPS)
    sums = ops.batch_norm_act_reduce(grad, x, moments, affine, None, None, None, *act)
    *_, coefficients = ops.batch_norm_coefficients(sums, 0, moments, weight, EPS, x.numel() // 24, True)
    dx, _ = ops.batch_norm_act_backward(grad, x, affine, coefficients, None, None, None, *act, 0)
    fused = {"z": ops.batch_norm_act(x, affine, None, None, *act), "dx": dx}
    assert_as_accurate_as_stock(fused, stock(dtype), stock(torch.float64))


@each_act
def test_value_and_gradient_are_as_accurate_as_stock(act):
    """Without the batch norm, whose rounding hides theirs; the minima of SiLU and GELU are among the values."""
    v = torch.cat([torch.linspace(-15, 15, 100_003), torch.linspace(-1.3, -0.7, 100_003)])
    exact = {"value": value(act, v.double()), "gradient": gradient(act, torch.ones_like(v).double(), v.double())}
    stock = {"value": value(act, v), "gradient": gradient(act, torch.ones_like(v), v)}
    for by in gradients_of(act, v):
        assert_as_accurate_as_stock({"value": value_of(act, v), "gradient": by}, stock, exact)


@pytest.mark.parametrize(("kind", "least"), [(Kind.SILU, -80), (Kind.GELU, -12)], ids=["silu", "gelu"])
def test_small_values_keep_their_digits(kind, least):
    v = torch.linspace(least, 0, 200_001)[:-1]
    wide = v.double()
    exact = wide * (torch.erfc(-wide / 2**0.5) / 2 if kind == Kind.GELU else wide.sigmoid())
    error = (value_of(Act(kind), v) - exact).abs() / exact.abs() / torch.finfo(v.dtype).eps
    # what is rounded in front of an exponential is magnified by its size
    size = v.square() / 2 if kind == Kind.GELU else 0
    assert (error <= 4 + size).all()


@each_dtype
@each_act
def test_special_values_are_those_of_float64(act, dtype):
    v = SPECIAL.to(dtype)
    assert_special_values(act, v, value_of(act, v), gradients_of(act, v))


@each_dtype
@each_act
def test_nan_stays_one_and_has_the_gradient_of_where_no_comparison_holds(act, dtype):
    v = torch.full((70,), torch.nan, dtype=dtype)
    assert value_of(act, v).isnan().all()
    expected = {Kind.NONE: 1, Kind.RELU: 1, Kind.LEAKY_RELU: act.alpha, Kind.HARDTANH: 1}.get(Kind(act.kind), torch.nan)
    for got in gradients_of(act, v):
        torch.testing.assert_close(got, torch.full_like(v, expected), equal_nan=True)


@each_format
@each_dtype
@each_act
def test_a_tail_is_as_any_other_element_and_nothing_behind_it_is_written(act, dtype, memory_format):
    v = torch.randn(LENGTHS[-1]).mul(3).to(dtype)
    whole, (by_x, by_z) = value_of(act, v), gradients_of(act, v)
    exact = gradient(act, torch.ones_like(v).double(), v.double())
    for length in LENGTHS:
        columns = memory_format is torch.contiguous_format
        shape, channels = ((1, 1, 1, length), 1) if columns else ((1, length, 1, 1), length)
        memory, x, affine = v.clone(), v[:length].view(shape), identity(dtype, channels)
        ops.batch_norm_act_(memory[:length].view(shape), affine, None, None, *act)
        assert torch.equal(memory[:length], whole[:length])
        assert torch.equal(memory[length:], v[length:])

        moments = torch.zeros(3, channels, dtype=affine.dtype)
        sums = ops.batch_norm_act_reduce(torch.ones_like(x), x, moments, affine, None, None, None, *act)
        expected = exact[:length].sum() if columns else exact[:length]
        torch.testing.assert_close(sums[0].double(), expected.expand(channels), rtol=1e-4, atol=1e-4)
        for z, wanted in ((None, by_x), (x, by_z)):
            memory = torch.ones_like(v)
            ops.batch_norm_act_backward_(memory[:length].view(shape), x, affine, affine[:1], z, *act, False)
            assert torch.equal(memory[:length], wanted[:length])
            assert memory[length:].eq(1).all()


@pytest.mark.parametrize("act", [-1, len(EXAMPLES), 2**40])
def test_an_unknown_activation_is_named(act):
    x, rows, pair = torch.zeros(2, 8, 4, 4), torch.zeros(4, 8), [2, 2]
    moments, affine, act = rows[:3], rows[:2], (act, 0.0, 0.0)
    for name, arguments in {
        "batch_norm_act": (x, affine, None, None, *act),
        "batch_norm_act_": (x, affine, None, None, *act),
        "batch_norm_act_reduce": (x, x, moments, affine, None, None, None, *act),
        "batch_norm_act_backward": (x, x, affine, rows, None, None, None, *act, 0),
        "batch_norm_act_backward_": (x, x, affine, rows, None, *act, False),
        "batch_norm_act_pool": (x, affine, *act, pair, pair, [0, 0]),
    }.items():
        message = f"fused_resnet::{name}: act must have a value from 0 to 7, got {act[0]}"
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, name)(*arguments)


def test_the_numbers_are_those_of_the_kernels():
    """A kind that is new in Python alone would be refused, and one that moved would be another."""
    v = torch.randn(100, dtype=torch.float64) * 2
    for kind in Kind:
        act = next(act for act in EXAMPLES if act.kind == kind)
        torch.testing.assert_close(value_of(act, v), value(act, v))


@pytest.mark.skipif("FUSED_RESNET_ISA" in os.environ, reason="an instruction set is forced")
def test_every_instruction_set_passes_these_tests():
    """In a process each, since the set is chosen once."""
    native = pytest.importorskip("fused_resnet._C", reason="built without Python's headers")
    for isa in native.isas():
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "FUSED_RESNET_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{isa}: {run.stdout[-5000:]}"
