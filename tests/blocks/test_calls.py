"""Calls that are stock's: other inputs, stock's errors, transforms, tracers; under autocast, stock's dtype."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet.surgery import NothingToFuse
from tests.support.hand_written import (
    Basic,
    Broadcast,
    Functional,
    InSequential,
    LinearEnd,
    OptionA,
    OptionAOfAnother,
    PreActivation,
    WithoutConvolution,
    images,
    make,
)


def test_stocks_error_comes_for_another_dtype(chains_run):
    stock, fused = make(Basic), fused_resnet.fuse(make(Basic))
    for x in (images().double(), images().bfloat16()):
        with pytest.raises(RuntimeError) as expected:
            stock(x)
        with pytest.raises(RuntimeError) as got:
            fused(x)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("shape", [(2, 5, 6, 6), (8, 6), (2, 8, 6), (1, 2, 8, 6, 6)], ids=str)
def test_stocks_error_comes_for_another_shape(shape):
    stock, fused = make(Basic), fused_resnet.fuse(make(Basic))
    with pytest.raises((RuntimeError, ValueError)) as expected:
        stock(images(*shape))
    with pytest.raises(type(expected.value)) as got:
        fused(images(*shape))
    assert str(got.value) == str(expected.value)


def test_stocks_error_comes_for_one_value_per_channel():
    model = nn.Sequential(*InSequential())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused_resnet.fuse(model)(images(1, 8, 1, 1))


def test_a_norm_of_another_width_is_an_error():
    for width in (1, 4):
        model = fused_resnet.fuse(make(Basic), engine="reference")
        model.bn1 = nn.BatchNorm2d(width)
        with pytest.raises((RuntimeError, ValueError)):
            model(images())


def test_an_empty_batch_is_stocks():
    fused = fused_resnet.fuse(make(Basic)).eval()
    assert fused(images()[:0]).shape == (0, 8, 6, 6)


def test_a_keyword_argument_is_stocks():
    torch.testing.assert_close(fused_resnet.fuse(make(Basic)).eval()(x=images()), make(Basic).eval()(images()))


def test_meta_tensors_give_shapes():
    model = fused_resnet.fuse(make(Basic, 8, 16, 2)).to("meta")
    assert model(images().to("meta")).shape == (2, 16, 3, 3)
    with torch.device("meta"):
        model = fused_resnet.fuse(Basic(8, 16, 2))
        assert model(torch.empty(2, 8, 6, 6)).shape == (2, 16, 3, 3)


def test_functional_call_uses_the_parameters_that_it_is_given():
    stock, fused = make(Basic).eval(), fused_resnet.fuse(make(Basic)).eval()
    state = {name: t.detach() * 0.5 for name, t in stock.state_dict().items() if t.is_floating_point()}
    expected = torch.func.functional_call(stock, state, (images(),))
    torch.testing.assert_close(torch.func.functional_call(fused, state, (images(),)), expected)
    assert not torch.equal(fused(images()), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_function_transforms_go_through_stock():
    stock, fused = make(Basic).eval(), fused_resnet.fuse(make(Basic)).eval()
    x = images()

    def loss(model):
        return lambda x: model(x).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(loss(fused))(x), transform(loss(stock))(x))
    torch.testing.assert_close(
        torch.func.jvp(loss(fused), (x,), (torch.ones_like(x),)),
        torch.func.jvp(loss(stock), (x,), (torch.ones_like(x),)),
    )
    batched = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(fused)(batched), torch.func.vmap(stock)(batched))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_goes_through_stock():
    import torch.autograd.forward_ad as forward_ad

    stock, fused = make(Basic).eval(), fused_resnet.fuse(make(Basic)).eval()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(images(), torch.ones(2, 8, 6, 6))
        tangents = [forward_ad.unpack_dual(model(x)).tangent for model in (fused, stock)]
    torch.testing.assert_close(*tangents)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_it_is_plain_aten():
    fused = fused_resnet.fuse(make(Basic)).eval()
    traced = torch.jit.trace(fused, images())
    assert "fused_resnet" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images()), fused(images()))


def test_fx_traces_the_stock_forward():
    fused = fused_resnet.fuse(make(Basic)).eval()
    graph = torch.fx.symbolic_trace(fused)
    assert "bn1" in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(images()), fused(images()))


AUTOCAST = [Basic, Functional, LinearEnd, PreActivation, WithoutConvolution, Broadcast, OptionA, OptionAOfAnother]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", AUTOCAST)
def test_autocast_gives_stocks_dtype(cls, x_dtype):
    model = make(cls)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingToFuse)
            expected = copy.deepcopy(model).train(training)(images().to(x_dtype)).dtype
            fused = fused_resnet.fuse(copy.deepcopy(model)).train(training)
            assert fused(images().to(x_dtype)).dtype == expected
