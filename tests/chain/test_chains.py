"""Chains of one block against stock: every kind, dtype and layout, several steps, and what is no input."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.engines.tuning import Tuning, using
from tests.support.accuracy import (
    assert_as_accurate_as_stock,
    assert_fused_is_as_accurate_as_stock,
    gradient_for,
    record,
)
from tests.support.chains import CHAINS, images, make


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        pytest.param(torch.float32, None, id="fp32"),
        pytest.param(torch.bfloat16, None, id="bf16"),
        pytest.param(torch.float16, None, id="fp16"),
        pytest.param(torch.float32, torch.bfloat16, id="autocast-bf16"),
        pytest.param(torch.float32, torch.float16, id="autocast-fp16"),
    ],
)
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_as_accurate_as_stock(name, dtype, autocast, training, chains_run):
    half = dtype is not torch.float32 or autocast is not None
    model = make(name, clear=half).train(training)
    # what a norm or an add reads, autocast does not cast
    reads_x_itself = "pre-activation" in name or getattr(model, "project", model) is None
    x_dtype = autocast if autocast is not None and reads_x_itself else dtype
    draws = [images(model, seed=seed).to(x_dtype) for seed in range(7 if half else 1)]
    assert_fused_is_as_accurate_as_stock(model, *draws, dtype=dtype, autocast=autocast)
    assert len(chains_run) == len(draws)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_contiguous_chain_is_as_accurate_as_stock(name, engine):
    model = make(name)
    assert_fused_is_as_accurate_as_stock(model, images(model, layout=torch.contiguous_format), engine=engine)


def test_a_shortcut_of_another_tensor_is_part_of_the_chain(chains_run):
    model = fused_resnet.fuse(make("option A, other source"))
    model(images(model))
    assert [block[1] for blocks, _ in chains_run for block in blocks] == [((2, 2), 4, 4)]


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", ["bottleneck, projection", "bottleneck, stride 2"])
def test_gradients_have_stocks_strides_also_where_a_side_is_one(name, memory):
    """DistributedDataParallel compares strides that mean nothing."""
    model = make(name).to(memory_format=torch.channels_last)
    fused_resnet.fuse(model, memory=memory)(images(model)).sum().backward()
    assert [p.grad.stride() for p in model.parameters()] == [p.stride() for p in model.parameters()]


@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_gradients_come_back_in_the_parameters_strides(layout, weights):
    model = fused_resnet.fuse(make("bottleneck, stride 2")).to(memory_format=weights)
    model(images(model, layout=layout)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            assert parameter.grad.is_contiguous(memory_format=weights), name


@pytest.mark.parametrize("name", ["basic", "bottleneck, stride 2", "pre-activation", "stem", "option A"])
@pytest.mark.parametrize("grad", ["expanded", "contiguous", "channels_last", "transposed"])
def test_any_strides_of_the_incoming_gradient_are_as_accurate_as_stock(name, grad):
    def reduce(z: Tensor) -> Tensor:
        """Return a sum whose gradient comes in the strides wanted."""
        if grad == "expanded":
            return z.sum()
        if grad == "transposed":
            z = z.transpose(2, 3)
        layout = torch.channels_last if grad == "channels_last" else torch.contiguous_format
        noise = gradient_for(z.detach().contiguous()).contiguous(memory_format=layout)
        return (z * noise.as_strided(z.shape, noise.stride())).sum()

    def run(model, x):
        return record(model, x, call=lambda x: reduce(model(x)))

    for layout in (torch.channels_last, torch.contiguous_format):
        model = make(name)
        x = images(model, layout=layout)
        exact, stock = run(copy.deepcopy(model).double(), x.double()), run(copy.deepcopy(model), x)
        assert_as_accurate_as_stock(run(fused_resnet.fuse(model), x), stock, exact)


@pytest.mark.parametrize("name", ["basic", "bottleneck, stride 2"])
def test_five_steps_accumulate_as_stocks(name):
    def run(model, x):
        for step in range(5):
            out = model(x + step)
            out.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()} | {n: b.clone() for n, b in model.named_buffers()}

    model = make(name)
    x = images(model)
    exact, stock = run(copy.deepcopy(model).double(), x.double()), run(copy.deepcopy(model), x)
    assert_as_accurate_as_stock(run(fused_resnet.fuse(model), x), stock, exact)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast-bf16"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("outputs", ["kept", "not kept"])
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection", "bottleneck, stride 2", "wide, stride 2"])
def test_the_end_of_a_block_is_as_accurate_as_stock_with_and_without_its_outputs(name, outputs, layout, autocast):
    model = make(name, clear=autocast is not None)
    draws = [images(model, layout=layout, seed=seed) for seed in range(7 if autocast else 1)]
    with using("cpu", Tuning(("cpu",), {("cpu", size): 64 for size in (2, 4) if outputs == "not kept"})):
        assert_fused_is_as_accurate_as_stock(model, *draws, autocast=autocast)


@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection", "wide, stride 2"])
@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_the_end_of_a_block_takes_an_input_in_another_format_than_its_weights(name, weights):
    other = torch.contiguous_format if weights is torch.channels_last else torch.channels_last
    model = make(name).to(memory_format=weights)
    assert_fused_is_as_accurate_as_stock(model, images(model, layout=other))
    gaps = images(model, size=24)[:, :, ::2, ::2]
    assert_fused_is_as_accurate_as_stock(model, gaps)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_one_value_per_channel_is_stocks_error():
    model = make("one unit")
    x = torch.randn(1, 16, 3, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(x)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused_resnet.fuse(model)(x)
    assert model.eval()(x).shape == (1, 8, 1, 1)


def test_a_shortcut_of_another_shape_is_an_error():
    model = fused_resnet.fuse(make("basic, stride 2"))
    model.project[0].stride = (1, 1)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)shape|size"):
        model(images(model))


def test_a_padded_shortcut_of_another_shape_is_an_error():
    model = fused_resnet.fuse(make("option A"))
    model.body[0] = nn.Conv2d(4, 16, 3, 2, 1)  # the shortcut's channels and the zeros are too few for the sum
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)shape|size"):
        model(torch.randn(2, 4, 12, 12))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_comes_out_where_stock_gives_it(bad):
    for name in ("basic", "bottleneck, stride 2", "stem", "option A"):
        model = make(name).eval()
        x = images(model)
        x[1, 2, 5, 5] = bad
        stock, fused = record(copy.deepcopy(model), x), record(fused_resnet.fuse(copy.deepcopy(model)), x)
        for key, t in stock.items():
            assert torch.equal(fused[key].isfinite(), t.isfinite()), (name, key)
