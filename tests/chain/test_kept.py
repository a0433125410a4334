"""What a chain keeps for backward, and what may be changed meanwhile."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support.accuracy import (
    assert_as_accurate_as_stock,
    assert_fused_is_as_accurate_as_stock,
    gradient_for,
    record,
)
from tests.support.chains import Block, images, make
from tests.support.saved import kept_for_backward


def test_a_lean_block_is_as_accurate_as_stock_and_keeps_less():
    torch.manual_seed(0)
    model = Block(72, (72, 72, 288), (1, 3, 1), stride=2)
    x = images(model)
    fast, lean = (assert_fused_is_as_accurate_as_stock(model, x, memory=memory) for memory in ("fast", "lean"))
    assert [row.reason for row in fused_resnet.explain(fast).fused] == [""]
    assert [row.reason for row in fused_resnet.explain(lean).fused] == ["body.6 and project.0 not kept"]
    kept, kept_lean = ([t.shape for t in kept_for_backward(m, x).values() if t.dim() == 4] for m in (fast, lean))
    wide = torch.Size((4, 288, 6, 6))
    assert (kept.count(wide), kept_lean.count(wide)) == (3, 1)  # its own output, and the two in front of the add


@pytest.mark.parametrize(
    "name", ["basic", "bottleneck", "bottleneck, stride 2", "stem", "five units", "one unit", "option A"]
)
def test_no_normalised_activation_is_kept(name):
    model = fused_resnet.fuse(make(name))
    x = images(model)
    z = model(x)
    raw = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: raw.append(out)) for m in model.modules() if type(m) is nn.Conv2d
    ]
    model(x)  # by hooks it runs stock, on other statistics but the same batch
    for hook in hooks:
        hook.remove()
    images_kept = [t for t in kept_for_backward(model, x).values() if t.dim() == 4 and t.is_floating_point()]
    for t in images_kept:
        same = [torch.allclose(t, y, atol=1e-4) for y in (*raw, z) if y.shape == t.shape]
        assert any(same), f"{tuple(t.shape)} is neither a convolution's output nor the chain's"


def test_a_change_in_place_of_what_is_kept_is_an_error():
    model = fused_resnet.fuse(make("basic"))
    x = images(model).requires_grad_()
    y = x * 1
    z = model(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    z = model(x)
    with torch.no_grad():
        model.body[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_running_statistics_may_change_between_forward_and_backward():
    for training in (True, False):
        model = fused_resnet.fuse(make("basic").train(training))
        x = images(model).requires_grad_()
        z = model(x)
        expected = torch.autograd.grad(z, x, gradient_for(z), retain_graph=True)[0]
        model.body[1].running_mean.add_(1)
        model.body[1].running_var.mul_(2)
        assert torch.equal(torch.autograd.grad(z, x, gradient_for(z))[0], expected)


def test_an_output_changed_in_place_gives_stocks_gradient_or_stocks_error():
    for name in ("one unit", "one unit without relu"):
        model = make(name)
        x = images(model)

        def run(model, x):
            x = x.clone().requires_grad_()
            z = model(x)
            z += 1
            z.square().sum().backward()
            return {"x": x.grad}

        if name == "one unit":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run(model, x)
            exact = record(copy.deepcopy(model).double(), x.double(), call=None)
            assert exact["x.grad"] is not None
            run(fused_resnet.fuse(model), x)  # keeps no output: nothing that it needs was changed
        else:
            exact, stock = run(copy.deepcopy(model).double(), x.double()), run(copy.deepcopy(model), x)
            assert_as_accurate_as_stock(run(fused_resnet.fuse(model), x), stock, exact)
