"""Gradients come where they are wanted, as accurate as stock's, and nothing is computed for others."""

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
    outputs_and_gradients,
)
from tests.support.chains import images, make
from tests.support.operations import Operations


def freeze_all_but(*kept: str):
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(name.startswith(k) for k in kept))

    return freeze


def freeze_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def freeze_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def one_norm_in_eval(model: nn.Module) -> None:
    model.body[1].eval()


def the_last_norm_in_eval(model: nn.Module) -> None:
    model.body[-1].eval()


def the_projections_norm_in_eval(model: nn.Module) -> None:
    model.project[1].eval()


FREEZES = {
    "nothing": freeze_all_but(""),
    "everything": freeze_all_but(),
    "all but the first conv": freeze_all_but("body.0"),
    "all but the first norm's scale": freeze_all_but("body.1.weight"),
    "all but the first norm's shift": freeze_all_but("body.1.bias"),
    "all but the second conv": freeze_all_but("body.3"),
    "all but the last norm": freeze_all_but("body.7"),
    "all but the projection": freeze_all_but("project"),
    "all but the projection's conv": freeze_all_but("project.0"),
    "all but the projection's norm": freeze_all_but("project.1"),
    "the norms": freeze_norms,
    "the convolutions": freeze_convolutions,
    "one norm in eval": one_norm_in_eval,
    "the last norm in eval": the_last_norm_in_eval,
    "the projection's norm in eval": the_projections_norm_in_eval,
}


@pytest.mark.parametrize("x_wants", [True, False], ids=["x with gradient", "x without"])
@pytest.mark.parametrize(
    ("name", "freeze"),
    [("bottleneck, stride 2", freeze) for freeze in FREEZES]
    + [("option A", freeze) for freeze in FREEZES if "projection" not in freeze],
)
def test_gradients_come_where_they_are_wanted_and_nowhere_else(name, freeze, x_wants):
    model = make(name)
    FREEZES[freeze](model)
    x = images(model)
    exact, stock = (
        outputs_and_gradients(copy.deepcopy(model).to(dtype), x.to(dtype), x_wants)
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate_as_stock(outputs_and_gradients(fused_resnet.fuse(model), x, x_wants), stock, exact)


def convolution_gradients(model: nn.Module, x: Tensor) -> list[int]:
    """How many convolutions' gradients a backward computes: of the input, of the weight, of the bias."""
    z = model(x)
    with Operations() as operations:
        z.square().sum().backward()
    masks = [args[-1] for func, args, _ in operations.calls if func is torch.ops.aten.convolution_backward.default]
    return [sum(mask[i] for mask in masks) for i in range(3)]


@using("cpu", Tuning(("cpu",), {}))  # the products of a y that is not kept are others
def test_no_gradient_is_computed_that_nobody_wants():
    for freeze in FREEZES:
        model = make("bottleneck, stride 2")
        FREEZES[freeze](model)
        if not any(p.requires_grad for p in model.parameters()):
            continue
        x = images(model)
        stock = convolution_gradients(copy.deepcopy(model), x)
        assert convolution_gradients(fused_resnet.fuse(model), x) == stock, freeze


def test_a_frozen_end_computes_no_product():
    model = make("bottleneck, stride 2")
    for path in ("body.6", "body.7", "project"):
        for parameter in model.get_submodule(path).parameters():
            parameter.requires_grad_(False)
    for parameter in model.body[:6].parameters():
        parameter.requires_grad_(False)
    model.body[7].bias.requires_grad_(True)  # its gradient is a sum
    assert convolution_gradients(fused_resnet.fuse(model), images(model)) == [0, 0, 0]
    model.body[7].weight.requires_grad_(True)
    assert convolution_gradients(model, images(model)) == [0, 2, 0]


@pytest.mark.parametrize("name", ["basic", "bottleneck", "bottleneck, stride 2", "stem", "pre-activation", "option A"])
def test_backward_can_run_twice(name):
    model = fused_resnet.fuse(make(name))
    z = model(images(model).requires_grad_())
    first = torch.autograd.grad(z, list(model.parameters()), gradient_for(z), retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(z, list(model.parameters()), gradient_for(z))
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(z, list(model.parameters()), gradient_for(z))


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", ["bottleneck", "bottleneck, projection"])
def test_the_first_product_adds_to_the_shortcuts_gradient(name, memory):
    model = make(name)
    x = images(model)
    z = assert_fused_is_as_accurate_as_stock(model, x, memory=memory)(x.requires_grad_())
    with Operations() as operations:
        z.square().sum().backward()
    assert operations.names.count("aten::addmm_") == 1
    assert "fused_resnet::add_masked_" not in operations.names
