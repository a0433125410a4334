"""A function that is off does not pass where batch_norm_act does."""

import pytest
import torch

from fused_resnet.functional import batch_norm_act
from tests.support import batch_norm_act as beside_stock
from tests.support.batch_norm_act import RESIDUALS, assert_accurate, make_arguments, run


class Spoiled(torch.autograd.Function):
    """The identity, but for a factor, forward or backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None, None


@pytest.mark.parametrize("factors", [(1 + 1e-5, 1), (1, 1 + 1e-5)], ids=["forward", "backward"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_function_that_is_off_fails(residual, factors, monkeypatch):
    arguments = make_arguments((2, 8, 5, 5), residual=residual)
    assert_accurate(arguments, "auto")

    def spoiled(*args, engine, **options):
        return Spoiled.apply(batch_norm_act(*args, **options), *factors)

    monkeypatch.setattr(beside_stock, "batch_norm_act", spoiled)
    with pytest.raises(AssertionError, match="less accurate than stock"):
        assert_accurate(arguments, "auto")


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_run_gives_every_gradient_and_statistic_and_changes_no_argument(residual):
    arguments = make_arguments((2, 8, 5, 5), residual=residual)
    before = {name: t.clone() for name, t in arguments.items()}
    results = run(batch_norm_act, arguments, training=True)
    assert results.keys() == {"z"} | {name if "running" in name else f"{name}.grad" for name in arguments}
    assert all(torch.equal(t, before[name]) for name, t in arguments.items())
    assert not any(torch.equal(results[name], t) for name, t in before.items() if "running" in name)
