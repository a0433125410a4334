"""The dispatcher operations: their schemas, fakes and autograd, on the very arguments that chains call them with."""

import copy

import pytest
import torch

import fused_resnet
from tests.support.accuracy import assert_as_accurate_as_stock, record
from tests.support.chains import images, make
from tests.support.operations import Operations

NAMES = [
    "basic",
    "bottleneck, stride 2",
    "wide, stride 2",
    "pre-activation",
    "stem",
    "basic, conv bias",
    "norm, not affine",
    "option A",
    "option A, other source",
    "option A, other source alone",
    "option A, other source, stride 1",
    "stage: basic",
    "stage: bottleneck",
]


def detached(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return [detached(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_that_a_chain_calls_passes_opcheck(name, training, dtype, monkeypatch):
    model = fused_resnet.fuse(make(name).to(dtype).train(training), chain="stage")
    x = images(model).to(dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Operations("fused_resnet") as operations:
        model(x.requires_grad_()).square().sum().backward()
    monkeypatch.undo()
    assert {"fused_resnet::chain_forward", "fused_resnet::chain_backward"} <= set(operations.names)
    for func, args, kwargs in operations.calls:
        torch.library.opcheck(func, tuple(map(detached, args)), kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", NAMES)
def test_the_operation_gives_what_the_function_gives(name, monkeypatch):
    model = make(name)
    x = images(model)
    function = record(fused_resnet.fuse(make(name), chain="stage"), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    operation = record(fused_resnet.fuse(make(name), chain="stage"), x)
    for key, t in function.items():
        # a compiled program moves running statistics in plain torch, whose last bit may differ
        tolerance = torch.finfo(t.dtype).eps if "running" in key else 0
        torch.testing.assert_close(operation[key], t, rtol=tolerance, atol=tolerance, msg=key)


def test_the_operations_refuse_the_gradient_of_a_gradient(monkeypatch):
    model = fused_resnet.fuse(make("basic"))
    x = images(model).requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    (dx,) = torch.autograd.grad(model(x).square().sum() + x.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*under torch\.compile.*unfuse"):
        dx.square().sum().backward()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_a_chain_is_as_accurate_as_stock(name, training):
    model = make(name).train(training)
    x = images(model)
    exact, stock = record(copy.deepcopy(model).double(), x.double()), record(copy.deepcopy(model), x)
    fused = fused_resnet.fuse(model, chain="stage")
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_as_accurate_as_stock(record(fused, x, call=compiled), stock, exact)


def test_a_chain_counts_its_floating_point_operations():
    from torch.utils.flop_counter import FlopCounterMode

    def count(model, x):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    for name in ("basic", "bottleneck, stride 2", "stage: bottleneck"):
        stock, fused = make(name), fused_resnet.fuse(make(name), chain="stage")
        assert count(fused, images(fused)) == count(stock, images(stock)) > 0
