"""batch_norm_act takes any strides, changes and shares nothing, and computes the gradients that are wanted."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fused_resnet.functional import batch_norm_act
from tests.support.accuracy import assert_as_accurate_as_stock, gradient_for
from tests.support.batch_norm_act import (
    CPU_ENGINES,
    LAYOUTS,
    RESIDUALS,
    assert_accurate,
    make_arguments,
    stock_batch_norm_act,
)

# ---- memory ----------------------------------------------------------------------------------------------------------


def transposed(t: Tensor) -> Tensor:
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def every_other_channel(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, 1)[:, ::2]


def offset(t: Tensor) -> Tensor:
    """An address that is not a multiple of what vectors load."""
    storage = t.new_empty(t.numel() + 1)
    return storage[1:].view(t.shape).copy_(t)


def expanded(t: Tensor) -> Tensor:
    return t[:1, :, :, :1].expand(t.shape)


def cropped(t: Tensor) -> Tensor:
    return F.pad(t, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize("stride", [transposed, every_other_channel, offset, expanded, cropped])
@pytest.mark.parametrize("place", ["x", "residual", "grad"])
@pytest.mark.parametrize("residual", ["residual", "residual norm"])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_any_strides_are_as_accurate_as_stock(engine, residual, place, stride):
    arguments = make_arguments((4, 8, 6, 5), residual=residual)
    grad = gradient_for(arguments["x"])
    leaves = {n: t.clone().requires_grad_() for n, t in arguments.items() if t is not None and "running" not in n}

    def strided(function, dtype):
        a = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
        views = {name: stride(t) if name == place else t for name, t in a.items()}
        norms = {p: (None, None, views[f"{p}weight"], views[f"{p}bias"]) for p in ("", "r_") if f"{p}weight" in views}
        z = function(views["x"], *norms[""], residual=views["residual"], residual_norm=norms.get("r_"), training=True)
        g = grad.to(dtype)
        z.backward(stride(g) if place == "grad" else g)
        return {"z": z.detach()} | {name: t.grad for name, t in a.items()}

    assert_as_accurate_as_stock(
        strided(functools.partial(batch_norm_act, engine=engine), torch.float32),
        strided(stock_batch_norm_act, torch.float32),
        strided(stock_batch_norm_act, torch.float64),
    )


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_x_and_residual_may_differ_in_layout(x_layout, residual_layout, engine):
    arguments = make_arguments((2, 8, 6, 5), layout=LAYOUTS[x_layout], residual="residual norm")
    arguments["residual"] = arguments["residual"].contiguous(memory_format=LAYOUTS[residual_layout])
    fused = assert_accurate(arguments, engine)
    assert fused["z"].is_contiguous(memory_format=LAYOUTS[x_layout])


@pytest.mark.parametrize("engine", CPU_ENGINES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", ["relu", "none"])
def test_no_argument_is_changed_and_no_result_shares_their_memory(engine, training, act):
    a = make_arguments((2, 8, 5, 5), residual="residual")
    x, residual = a["x"].requires_grad_(), a["residual"].requires_grad_()
    before = x.detach().clone(), residual.detach().clone()
    z = batch_norm_act(
        x, a["running_mean"], a["running_var"], residual=residual, training=training, act=act, engine=engine
    )
    grad = gradient_for(z)
    kept = grad.clone()
    dx, dr = torch.autograd.grad(z, (x, residual), grad)
    assert torch.equal(grad, kept)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    addresses = [t.untyped_storage().data_ptr() for t in (x, residual, z, grad, dx, dr)]
    assert len(set(addresses)) == len(addresses)


def test_saved_tensors_are_guarded_against_changes_in_place():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    y = x * 1
    z = batch_norm_act(y)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_an_output_whose_sign_masks_the_gradient_is_guarded_too():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    z = batch_norm_act(x, residual=torch.randn_like(x))
    with torch.no_grad():
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_gradcheck_passes(engine, residual, training):
    a = make_arguments((2, 3, 3, 2), torch.float64, residual=residual)
    names = [name for name in a if "running" not in name]
    norm = ("running_mean", "running_var", "weight", "bias")

    def function(*tensors):
        b = {n: t.clone() for n, t in a.items()} | dict(zip(names, tensors, strict=True))
        residual_norm = tuple(b[f"r_{n}"] for n in norm) if "r_weight" in b else None
        return batch_norm_act(
            b["x"], *(b[n] for n in norm), residual=b.get("residual"), residual_norm=residual_norm,
            training=training, engine=engine,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, [a[n].requires_grad_() for n in names], check_undefined_grad=False)


@pytest.mark.parametrize("wanted", ["x", "residual", "weight", "bias", "r_weight", "r_bias"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_only_the_gradients_that_are_wanted_are_computed(engine, training, wanted):
    a = make_arguments((2, 8, 5, 5), residual="residual norm")
    norm = ("running_mean", "running_var", "weight", "bias")

    def gradients(function, *require):
        b = {n: t.clone().requires_grad_(n in require) for n, t in a.items()}
        z = function(
            b["x"], *(b[n] for n in norm), residual=b["residual"], residual_norm=tuple(b[f"r_{n}"] for n in norm),
            training=training,
        )  # fmt: skip
        z.backward(gradient_for(z))
        return {n: t.grad for n, t in b.items()}

    function = functools.partial(batch_norm_act, engine=engine)
    alone, together = gradients(function, wanted), gradients(function, *(n for n in a if "running" not in n))
    assert {n for n, t in alone.items() if t is not None} == {wanted}
    assert_close(alone[wanted], together[wanted], rtol=0, atol=0)


def test_backward_can_run_twice():
    a = make_arguments((2, 8, 5, 5), residual="residual")
    x, residual = a["x"].requires_grad_(), a["residual"].requires_grad_()
    z = batch_norm_act(x, residual=residual)
    first = torch.autograd.grad(z, (x, residual), gradient_for(z), retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(z, (x, residual), gradient_for(z))
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_no_graph_is_kept_without_gradients():
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.no_grad():
        assert not batch_norm_act(x).requires_grad
    assert not batch_norm_act(x.detach()).requires_grad
    with torch.inference_mode():
        assert batch_norm_act(x).is_inference()


def test_running_statistics_move_without_gradients_too():
    a = make_arguments((2, 8, 5, 5))
    mean = a["running_mean"].clone()
    with torch.no_grad():
        batch_norm_act(a["x"], mean, a["running_var"])
    assert_close(mean, 0.9 * a["running_mean"] + 0.1 * a["x"].mean((0, 2, 3)))
