"""The rule of accuracy itself: what is wrong must break it."""

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support.accuracy import (
    assert_as_accurate_as_stock,
    assert_fused_is_as_accurate_as_stock,
    outputs_and_gradients,
    outputs_of,
    why_inaccurate,
)


@pytest.fixture
def exact():
    return torch.randn(64, 32, dtype=torch.float64)


@pytest.fixture
def stock(exact):
    """An error of about two units in the last place."""
    return (exact * (1 + 2e-7 * torch.randn_like(exact))).float()


def test_stock_passes_its_own_rule(stock, exact):
    assert why_inaccurate(stock, stock, exact) is None


def test_the_best_rounding_passes(stock, exact):
    assert why_inaccurate(exact.float(), stock, exact) is None


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda t: t * (1 + 2e-6), id="a factor off by 2e-6"),
        pytest.param(lambda t: t + 1e-5, id="an offset of 1e-5"),
        pytest.param(lambda t: t.bfloat16().float(), id="rounded to bf16 on the way"),
        pytest.param(lambda t: torch.zeros_like(t), id="zeros"),
        pytest.param(lambda t: t.flip(0), id="another order"),
        pytest.param(lambda t: t.index_fill(0, torch.tensor([63]), 0), id="the last row left out"),
        pytest.param(lambda t: t.index_fill(0, torch.tensor([5]), float("nan")), id="NaN in a row"),
        pytest.param(lambda t: t.double(), id="another dtype"),
        pytest.param(lambda t: t[:, :1], id="another shape"),
        pytest.param(lambda t: None, id="nothing"),
    ],
)
def test_a_wrong_result_fails(spoil, stock, exact):
    assert why_inaccurate(spoil(stock), stock, exact) is not None


def test_nan_on_stocks_side_fails_too(stock, exact):
    assert "NaN" in why_inaccurate(stock, stock * float("nan"), exact)


def test_a_gradient_where_stock_has_none_fails(stock, exact):
    assert why_inaccurate(stock, None, None) == "stock, exact has none"
    assert why_inaccurate(None, None, None) is None


def test_where_the_truth_is_zero_only_stocks_own_noise_is_allowed(exact):
    zero = torch.zeros_like(exact)
    assert why_inaccurate(zero.float(), zero.float(), zero) is None
    assert why_inaccurate(zero.float() + 1e-12, zero.float(), zero) is not None


def test_counters_must_be_equal():
    one, two = torch.tensor(1), torch.tensor(2)
    assert why_inaccurate(one, one, one) is None
    assert why_inaccurate(two, one, one) is not None


def test_one_bad_gradient_among_many_is_named(stock, exact):
    good = {"output": stock, "x.grad": stock, "weight.grad": stock}
    truth = dict.fromkeys(good, exact)
    assert_as_accurate_as_stock(good, good, truth)
    with pytest.raises(AssertionError, match=r"1 of 3 .*\nweight\.grad: error"):
        assert_as_accurate_as_stock(good | {"weight.grad": stock * 1.001}, good, truth)


def test_a_result_left_out_fails(stock, exact):
    with pytest.raises(AssertionError):
        assert_as_accurate_as_stock({}, {"output": stock}, {"output": exact})


def test_an_error_in_most_draws_fails_and_one_of_luck_does_not(stock, exact):
    draws = [{"output": stock}] * 5
    bad, truth = {"output": stock * 1.001}, [{"output": exact}] * 5
    assert_as_accurate_as_stock([bad, *draws[1:]], draws, truth)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_stock([bad, bad, bad, *draws[3:]], draws, truth)
    with pytest.raises(AssertionError, match="NaN"):
        assert_as_accurate_as_stock([{"output": stock * float("nan")}, *draws[1:]], draws, truth)


# ---- a model and its fused copy --------------------------------------------------------------------------------------


def a_wrong_output(model):
    model.register_forward_hook(lambda m, args, z: z * 1.00001)


def a_wrong_gradient(model):
    model[0].weight.register_hook(lambda grad: grad * 1.00001)


def a_wrong_statistic(model):
    def change(module, args, z):
        module[1].running_var.mul_(1.00001)

    model.register_forward_hook(change)


def a_lost_gradient(model):
    model[0].weight.requires_grad_(False)


@pytest.mark.parametrize("fault", [a_wrong_output, a_wrong_gradient, a_wrong_statistic, a_lost_gradient])
def test_a_fused_model_that_is_off_fails(fault, monkeypatch):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 3, 6, 6)
    assert_fused_is_as_accurate_as_stock(model, x)
    fuse = fused_resnet.fuse

    def faulty(model):
        fault(fuse(model))
        return model

    monkeypatch.setattr(fused_resnet, "fuse", faulty)
    with pytest.raises(AssertionError, match="less accurate than stock"):
        assert_fused_is_as_accurate_as_stock(model, x)


def test_outputs_are_found_wherever_they_are():
    a, b, c = torch.randn(3, 2).unbind()
    assert [id(t) for t in outputs_of({"a": a, "more": [(b, None), 1, {"c": c}]})] == [id(a), id(b), id(c)]


@pytest.mark.parametrize("x_wants", [True, False])
def test_a_step_has_a_gradient_or_none_for_every_parameter(x_wants):
    model = nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    results = outputs_and_gradients(model, torch.randn(2, 3), x_wants)
    assert {name for name, t in results.items() if t is not None} == {"z", "weight"} | ({"x"} if x_wants else set())


def test_torch_empty_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(3).new_empty(2).isnan().all()
