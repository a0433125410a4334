"""A 1×1 convolution with the sums of the batch norms beside it: every engine against float64 and against stock.

Triton's kernels run on the GPU that is there, else in Triton's interpreter.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet import ops
from fused_resnet.ops import pointwise_conv
from fused_resnet.ops.launch import float32_precision
from fused_resnet.ops.pointwise_conv import reference
from fused_resnet.ops.pointwise_conv.config import in_parts, makes_weight_gradient
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.problem import EPS, assert_close
from tests.support.triton_engine import triton_kernels

# of the interpreter, which takes a program's number from an array
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

# images, inputs, height, width, outputs: rows that no tile divides, channels that no vector divides, one tile of rows
# and several parts, one step of a product and several, several tiles of channels
SHAPES = [(1, 40, 10, 20, 24), (1, 24, 7, 7, 72), (2, 64, 33, 40, 64), (3, 96, 9, 5, 130), (4, 72, 16, 16, 19)]
ENGINES = ["reference", "composed", "triton"]

each_engine = pytest.mark.parametrize("k", ENGINES, indirect=True)
only_triton = pytest.mark.parametrize("k", ["triton"], indirect=True)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)


@pytest.fixture
def k(request, monkeypatch):
    if request.param == "triton":
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # what a test draws is there, too
            triton_kernels(monkeypatch)
            yield ops.triton_kernels(pointwise_conv)
    elif request.param == "composed":
        yield ops.kernels("reference", "cpu", torch.float32)
    else:
        yield reference


class Problem(SimpleNamespace):
    """The arguments of both operations."""

    @classmethod
    def draw(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "Problem":
        n, inputs, height, width, outputs = shape

        def activation(channels: int) -> Tensor:
            values = torch.randn(n, channels, height, width).add(0.5).to(dtype)
            return values.contiguous(memory_format=torch.channels_last)

        return cls(
            x=activation(inputs),
            z=activation(inputs).relu(),
            d_source=activation(inputs),
            dy=activation(outputs),
            conv_weight=torch.randn(outputs, inputs, 1, 1).div(inputs**0.5).to(dtype),
            weight=torch.randn(outputs),
            bias=torch.randn(outputs),
        )

    def double(self) -> "Problem":
        return Problem(**{name: value.double() for name, value in vars(self).items()})

    def stats(self, k) -> dict[str, Tensor]:
        y, moments, affine = k.pointwise_conv_stats(self.x, self.conv_weight, self.weight, self.bias, EPS)
        assert y.is_contiguous(memory_format=torch.channels_last)
        return {"y": y, "mean": moments[0], "var": moments[1], "unbiased": moments[2], "a": affine[0], "b": affine[1]}

    def add_grad(self, k, wants_weight: bool = True) -> dict[str, Tensor]:
        d_source = self.d_source.clone()
        sums, d_weight = k.pointwise_conv_add_grad_(d_source, self.dy, self.conv_weight, self.z, wants_weight)
        results = {"d_source": d_source, "sums": sums}
        if wants_weight:
            return {**results, "d_weight": d_weight}
        assert d_weight.numel() == 0
        return results

    def stock_stats(self) -> dict[str, Tensor]:
        y = F.conv2d(self.x, self.conv_weight)
        var, mean = torch.var_mean(y.to(self.weight.dtype), (0, 2, 3), correction=0)
        count = y.numel() // y.shape[1]
        a = self.weight * (var + EPS).rsqrt()
        rows = {"mean": mean, "var": var, "unbiased": var * count / (count - 1), "a": a, "b": self.bias - mean * a}
        return {"y": y, **rows}

    def stock_add_grad(self, wants_weight: bool = True) -> dict[str, Tensor]:
        """What autograd does: the convolution's gradients, the shortcut's, the ReLU's and the sum, one by one."""
        conv = None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1
        dz, d_weight, _ = torch.ops.aten.convolution_backward(
            self.dy, self.z, self.conv_weight, *conv, [True, wants_weight, False]
        )
        d_source = torch.ops.aten.threshold_backward(self.d_source + dz, self.z, 0)
        results = {"d_source": d_source, "sums": d_source.sum((0, 2, 3), dtype=self.weight.dtype)}
        return {**results, "d_weight": d_weight.to(self.weight.dtype)} if wants_weight else results


def assert_stats(k, p: Problem) -> None:
    """As accurate as stock; and the statistics are those of the rounded ``y``, to a few units in the last place."""
    results = p.stats(k)
    assert_as_accurate_as_stock(results, p.stock_stats(), p.double().stock_stats())
    y = results["y"].double()
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    assert_close(results["mean"], mean.float())
    assert_close(results["var"], var.float(), 16)


def assert_add_grad(k, p: Problem, wants_weight: bool) -> None:
    results, exact = p.add_grad(k, wants_weight), p.double().stock_add_grad(wants_weight)
    assert_as_accurate_as_stock(results, p.stock_add_grad(wants_weight), exact)
    stored = results["d_source"]
    assert not stored[p.z <= 0].any()
    assert_close(results["sums"], stored.double().sum((0, 2, 3)).float(), 16)


@each_shape
@each_dtype
@each_engine
def test_forward_is_as_accurate_as_stock(k, dtype, shape):
    assert_stats(k, Problem.draw(shape, dtype))


@each_shape
@each_dtype
@each_engine
def test_backward_is_as_accurate_as_stock(k, dtype, shape):
    p = Problem.draw(shape, dtype)
    for wants_weight in {False, makes_weight_gradient(shape[-1])}:
        assert_add_grad(k, p, wants_weight)


@only_triton
def test_a_weight_gradient_of_too_many_outputs_is_refused(k):
    assert makes_weight_gradient(128)
    assert not makes_weight_gradient(129)
    with pytest.raises(Exception, match="holds the weight gradient of all outputs"):
        Problem.draw((1, 16, 2, 2, 129), torch.float32).add_grad(k)


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float32, 1000), (torch.bfloat16, 30), (torch.bfloat16, 100)], ids=str
)
@each_engine
def test_a_mean_far_from_zero_costs_no_digits(k, dtype, offset):
    p = Problem.draw(SHAPES[2], dtype)
    p.x[:, 0], p.conv_weight[:, 0] = offset, 1
    assert_stats(k, p)


@each_dtype
@each_engine
def test_channels_that_do_not_vary(k, dtype):
    p = Problem.draw(SHAPES[0], dtype)
    p.conv_weight[3] = 0
    p.d_source[:, 5], p.dy[:] = 0, 0
    results = p.stats(k)
    assert (results["mean"][3], results["var"][3], results["unbiased"][3]) == (0, 0, 0)
    assert_stats(k, p)
    assert p.add_grad(k)["sums"][5] == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN and infinity
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@each_engine
def test_what_is_not_finite_comes_out_where_stock_gives_it(k, value):
    p = Problem.draw(SHAPES[0], torch.float32)
    for row in (0, 9):  # the first is in the tile that is looked at first
        p.x[0, 1, row, 0] = value
        for name, result in p.stock_stats().items():
            assert torch.equal(p.stats(k)[name].isfinite(), result.isfinite()), name
        p.x[0, 1, row, 0] = 0
    p.d_source[0, 2, 3, 4], p.z[0, 2, 3, 4] = value, 1
    p.dy[0, 1, 5, 5] = value
    p.z[0, 4, 6, 6], p.d_source[0, 4, 6, 6] = torch.nan, 1  # passes, as in stock
    results, expected = p.add_grad(k), p.stock_add_grad()
    for name in expected:
        assert torch.equal(results[name].isfinite(), expected[name].isfinite()), name
    assert results["d_source"][0, 4, 6, 6] != 0


@only_triton
def test_an_empty_batch_gives_nan_statistics_and_no_sum(k):
    p = Problem.draw((0, *SHAPES[0][1:]), torch.float32)
    y, moments, affine = k.pointwise_conv_stats(p.x, p.conv_weight, p.weight, p.bias, EPS)
    assert y.shape == p.dy.shape
    assert moments.isnan().all()
    assert affine.isnan().all()
    results = p.add_grad(k)
    assert torch.equal(results["sums"], torch.zeros(40))
    assert torch.equal(results["d_weight"], torch.zeros(24, 40, 1, 1))


@each_engine
def test_the_same_arguments_give_the_same_bits(k):
    p = Problem.draw(SHAPES[2], torch.bfloat16)
    for run in (p.stats, p.add_grad):
        first, second = run(k), run(k)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_products_of_float32_follow_torchs_switch():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in [("high", "tf32"), ("highest", "ieee")]:
            torch.set_float32_matmul_precision(precision)
            assert float32_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("rows", [1, 63, 64, 200, 802816, 2**31 + 5])
@pytest.mark.parametrize("tiles", [1, 3, 5, 300])
def test_the_parts_cover_every_row_once(rows, tiles):
    parts, rows_per_part = in_parts(rows, 64, tiles, 264)
    assert 1 <= parts <= 264
    assert rows_per_part % 64 == 0
    assert (parts - 1) * rows_per_part < rows <= parts * rows_per_part
