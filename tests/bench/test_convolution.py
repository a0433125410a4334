"""The convolutions of a network one by one."""

import pytest
import torch

from fused_resnet.bench.convolution import DGRAD, FPROP, PASSES, WGRAD, Convolution, ConvShape, distinct_convolutions
from fused_resnet.bench.rows import MATMUL, STOCK
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites.conv import measure_conv

CPU = torch.device("cpu")


def test_a_resnet50_has_each_of_its_shapes_once():
    shapes = distinct_convolutions(("resnet50",), 224)
    assert len(shapes) == len(set(shapes)) == 23
    assert shapes[0] == ConvShape((3, 224, 224), (64, 3, 7, 7), 2, 3, 1)
    assert shapes[0].output == (64, 112, 112)
    assert distinct_convolutions(("resnet50", "resnet50"), 224) == shapes


@pytest.mark.parametrize("shape", distinct_convolutions(("resnet50",), 32), ids=str)
def test_shapes_and_arithmetic_are_those_of_the_convolution(shape):
    conv = Convolution(shape, 2, torch.float32, CPU)
    y = conv.by_library(FPROP)()
    assert tuple(y.shape[1:]) == shape.output
    assert shape.flop(2) == 2 * y.numel() * conv.weight[0].numel()
    assert shape.bytes(2, 4) == 4 * (conv.x.numel() + y.numel() + conv.weight.numel())


def test_every_pass_is_autograds_and_the_product_of_matrices_is_too():
    shape = ConvShape((8, 5, 7), (12, 8, 1, 1), 1, 0, 1)
    conv = Convolution(shape, 3, torch.float64, CPU)
    x, weight = conv.x.clone().requires_grad_(), conv.weight.clone().requires_grad_()
    y = torch.conv2d(x, weight)
    dx, dw = torch.autograd.grad(y, (x, weight), conv.grad)

    def rows(t):
        return t.permute(0, 2, 3, 1).flatten(0, 2)

    torch.testing.assert_close(conv.by_library(FPROP)(), y)
    torch.testing.assert_close(conv.by_library(DGRAD)()[0], dx)
    torch.testing.assert_close(conv.by_library(WGRAD)()[1], dw)
    torch.testing.assert_close(conv.as_product(FPROP)(), rows(y))
    torch.testing.assert_close(conv.as_product(DGRAD)(), rows(dx))
    torch.testing.assert_close(conv.as_product(WGRAD)(), dw.flatten(1))


def test_the_suite_has_a_row_for_every_pass_and_a_product_for_every_1x1():
    settings = Settings(
        models=("resnet20",), batch_size=2, image_size=8, dtypes=("fp32",), op_repeats=1, copy=1e9, matmul=1e9
    )
    rows = list(measure_conv(settings))
    shapes = distinct_convolutions(("resnet20",), 8)
    assert len(rows) == len(PASSES) * len(shapes) - 1  # the image has no gradient
    products = [row for row in rows if MATMUL in row.values]
    assert all(STOCK in row.values and row.limit.flop > 0 for row in rows)
    assert {row.case["kernel"].split()[1] for row in products} <= {"1x1"}
