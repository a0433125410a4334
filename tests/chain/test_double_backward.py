"""The gradient of a gradient: of every kind of chain, against numbers and against stock."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet.chain.spec import act_signature
from fused_resnet.functional import batch_norm_act
from fused_resnet.ops.activation import RELU
from tests.support.accuracy import assert_as_accurate_as_stock, gradient_for
from tests.support.chains import BASIC, BOTTLENECK, CHAINS, STAGES, Block, images, make

NAMES = [*CHAINS, *(f"stage: {name}" for name in STAGES)]
DETACHED = ("option A, other source alone", "option A, other source detached")  # differences see what is detached
SOME = [
    "basic, conv bias",
    "bottleneck, stride 2",
    "pre-activation",
    "stem",
    "option A, other source",
    "stage: option A",
]
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def fused_copy(model: nn.Module, **options) -> nn.Module:
    return fused_resnet.fuse(copy.deepcopy(model), chain="stage", **options)


def small(model: nn.Module, **options) -> torch.Tensor:
    """The smallest images that leave more than a pixel behind every stride."""
    return images(model, size=8 if any(m.kernel_size == (7, 7) for m in convolutions(model)) else 5, **options)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def penalised_step(
    model: nn.Module, x: torch.Tensor, *, autocast: torch.dtype | None = None, call=None
) -> dict[str, torch.Tensor | None]:
    """Run a step with a gradient penalty on ``x``; return the first gradients, the step's, and the buffers."""
    x = x.detach().clone().requires_grad_()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        z = (model if call is None else call)(x)
    first = torch.autograd.grad(z, (x, *parameters.values()), gradient_for(z), create_graph=True)
    results = dict(zip((f"first {name}" for name in ("x", *parameters)), (t.detach() for t in first), strict=True))
    (z.float().square().mean() + sum(t.float().square().mean() for t in first)).backward()
    results["x.grad"] = x.grad
    results.update({f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()})
    results.update({name: buffer.clone() for name, buffer in model.named_buffers()})
    return results


def assert_penalised_step_is_as_accurate_as_stocks(model, *draws, autocast=None, **options):
    fused = fused_copy(model, **options)
    state = copy.deepcopy(model.state_dict())
    ours, stock, exact = [], [], []
    for x in draws:
        for module in (model, fused):
            module.load_state_dict(state)
            module.zero_grad()
        exact.append(penalised_step(copy.deepcopy(model).double(), x.double()))
        stock.append(penalised_step(model, x, autocast=autocast))
        ours.append(penalised_step(fused, x, autocast=autocast))
    assert_as_accurate_as_stock(ours, stock, exact)


# ---- against differences ---------------------------------------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("name", [name for name in NAMES if name not in DETACHED])
def test_second_derivatives_are_those_of_differences(name, training, chains_run):
    """Nothing that a ReLU or a pool reads is as near to a kink as the differences are small, with these seeds."""
    model = fused_copy(make(name).double().train(training))
    x = small(model).double().requires_grad_()
    parameters = dict(model.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), x)

    arguments = (x, *(p.detach().clone().requires_grad_() for p in parameters.values()))
    assert gradcheck(call, arguments, fast_mode=True)
    assert gradgradcheck(call, arguments, fast_mode=True)
    assert chains_run


@pytest.mark.parametrize("kind", ["alone", "residual", "x itself", "residual_norm"])
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
@TRAINING
def test_second_derivatives_of_the_function(training, affine, act, kind):
    def vector(positive=False):
        t = torch.randn(3, dtype=torch.float64)
        return t.abs() + 0.5 if positive else t

    x, residual = torch.randn(2, 2, 3, 3, 2, dtype=torch.float64).requires_grad_().unbind()
    running = [vector(), vector(positive=True), vector(), vector(positive=True)]
    weight = vector().requires_grad_() if affine in ("both", "weight") else None
    bias = vector().requires_grad_() if affine in ("both", "bias") else None

    def call(x, residual, weight, bias):
        norm = None if kind != "residual_norm" else (*running[2:], bias, weight)
        side = {"alone": None, "x itself": x}.get(kind, residual)
        z = batch_norm_act(
            x, *running[:2], weight, bias, residual=side, residual_norm=norm, training=training, momentum=0.0, act=act
        )
        return z + residual  # so that everything has a gradient

    arguments = (x.detach().requires_grad_(), residual.detach().requires_grad_(), weight, bias)
    assert gradgradcheck(call, arguments, fast_mode=True)


def test_third_derivatives_are_those_of_differences():
    """In eval: those of stock PyTorch's batch norm in training take the batch's statistics for constants."""
    model = fused_copy(make("basic").double().eval())
    x = small(model)[:2, :, :3, :3].double().requires_grad_()

    def first(x):
        (dx,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
        return dx

    assert gradgradcheck(first, x, fast_mode=True)


# ---- against stock ---------------------------------------------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_a_gradient_penalty_is_as_accurate_as_stocks(name, memory, training):
    model = make(name).train(training)
    assert_penalised_step_is_as_accurate_as_stocks(model, small(model), memory=memory)


@TRAINING
@pytest.mark.parametrize("name", ["bottleneck, projection", "stem", "one unit", "stage: two projections"])
def test_under_autocast_it_is_as_accurate_as_stocks(name, training):
    model = make(name, clear=True).train(training)
    draws = [images(model, seed=seed) for seed in range(7)]
    assert_penalised_step_is_as_accurate_as_stocks(model, *draws, autocast=torch.bfloat16)


@pytest.mark.parametrize("name", ["basic", "bottleneck, stride 2", "option A"])
def test_in_half_precision_it_is_as_accurate_as_stocks(name):
    model = make(name, clear=True).bfloat16()
    draws = [images(model, seed=seed).bfloat16() for seed in range(7)]
    assert_penalised_step_is_as_accurate_as_stocks(model, *draws)


@pytest.mark.parametrize("frozen", ["weights", "norms", "all", "all but the last", "norms in eval"])
@pytest.mark.parametrize("name", SOME)
def test_with_frozen_parameters(name, frozen):
    model = make(name)
    parameters = list(model.parameters())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and frozen == "norms in eval":
            module.eval()
    for parameter in parameters:
        conv = parameter.dim() == 4
        if frozen in ("weights", "norms"):
            parameter.requires_grad_(conv == (frozen == "norms"))
        elif frozen in ("all", "all but the last"):
            parameter.requires_grad_(frozen != "all" and parameter is parameters[-1])
    assert_penalised_step_is_as_accurate_as_stocks(model, small(model))


@pytest.mark.parametrize("name", SOME)
def test_the_gradients_alone_move_no_statistics(name, chains_run):
    model = fused_copy(make(name))
    z = model(small(model).requires_grad_())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.autograd.grad(z, list(model.parameters()), gradient_for(z), create_graph=True)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert chains_run


@pytest.mark.parametrize("name", SOME)
def test_x_has_another_path_to_the_loss(name):
    model = make(name).double()
    fused = fused_copy(model)

    def second(model):
        x = small(model).double().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum() + x.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, *model.parameters()))

    for ours, stocks in zip(second(fused), second(model), strict=True):
        torch.testing.assert_close(ours, stocks, rtol=1e-9, atol=1e-9)


def test_a_parameter_that_two_units_share_gets_both_parts():
    class Shared(nn.Sequential):
        def __init__(self):
            super().__init__(Block(4, (4, 4), (3, 3)))
            self[0].body[3].weight = self[0].body[0].weight

    torch.manual_seed(0)
    model = Shared()
    assert_penalised_step_is_as_accurate_as_stocks(model, small(model))


class Net(nn.Module):
    """A network small enough for all of its second derivatives."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(2, (2, 2), (3, 3)), Block(2, (2, 2, 4), (1, 3, 1), stride=2))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3)).square().sum()


@TRAINING
def test_the_hessian_is_stocks(training, chains_run):
    torch.manual_seed(0)
    model = Net().double().train(training)
    fused = fused_copy(model)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    direction = torch.randn_like(x)
    functions = torch.autograd.functional
    for wanted, arguments in (
        (functions.hessian, ()),
        (functions.hvp, (direction,)),
        (functions.vhp, (direction,)),
    ):
        ours, stocks = (wanted(net, x, *arguments) for net in (fused, model))
        torch.testing.assert_close(ours, stocks, rtol=1e-9, atol=1e-9)
    assert chains_run


@TRAINING
def test_the_hessian_of_the_parameters_is_stocks(training):
    torch.manual_seed(0)
    model = Net().double().train(training)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def hessian(net):
        names, values = zip(*net.named_parameters(), strict=True)

        def call(*values):
            return torch.func.functional_call(net, dict(zip(names, values, strict=True)), x)

        return torch.autograd.functional.hessian(call, values)

    ours, stocks = (hessian(net) for net in (fused_copy(model), model))
    torch.testing.assert_close(ours, stocks, rtol=1e-9, atol=1e-9)


def test_a_penalised_step_under_checkpointing_is_the_step():
    model = fused_copy(make("stage: bottleneck"))
    alone = copy.deepcopy(model)
    x = small(model)
    expected = penalised_step(alone, x)
    results = penalised_step(model, x, call=lambda x: checkpoint(model, x, use_reentrant=False))
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def test_synchronised_norms_are_refused():
    """Without other processes: only their name is asked for."""
    from fused_resnet.chain import autograd
    from fused_resnet.chain.spec import make_chain

    unit = (None, True, True, True, "group", (1e-5).hex(), act_signature(RELU))
    chain = make_chain(((((unit,), None, None),), ("reference", "fast")))
    x, weight, bias = torch.randn(2, 3, 4, 4), torch.ones(3), torch.zeros(3)
    arguments = [t.requires_grad_() for t in (x, weight, bias)]

    class Kept:
        """What a node's context has when its backward runs."""

        n_parameters, n_running, needs_input_grad = 2, 0, (False, False, True, False, True, True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "_run_backward", lambda *_: (x.detach(), None, weight.detach(), bias.detach()))
        Kept.chain, Kept.saved_tensors = chain, (arguments[0], None, None, *arguments[1:])
        _, _, dx, *_ = autograd._ChainFunction.backward(Kept, torch.ones_like(x, requires_grad=True))
        with pytest.raises(RuntimeError, match=r"create_graph=True.*synchronised.*unfuse"):
            dx.sum().backward()


def test_a_wide_bottleneck_whose_outputs_are_not_kept():
    torch.manual_seed(0)
    model = Block(12, (12, 12, 48), BOTTLENECK[1], stride=2)
    assert_penalised_step_is_as_accurate_as_stocks(model, small(model), memory="lean")
    assert_penalised_step_is_as_accurate_as_stocks(Block(16, *BASIC), small(Block(16, *BASIC)), engine="reference")
