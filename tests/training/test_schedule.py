"""The exact learning rates of a run."""

import math

import pytest
import torch

from fused_resnet.training import named
from fused_resnet.training.schedule import make_scheduler


def rates(recipe, steps, at, lr=None):
    """The learning rates of the given steps, counted from 0."""
    weight = torch.nn.Parameter(torch.zeros(()))
    weight.grad = torch.zeros(())
    optimizer = torch.optim.SGD([weight], lr=recipe.lr if lr is None else lr)
    scheduler = make_scheduler(optimizer, recipe, steps)
    found = {}
    for step in range(steps):
        if step in at:
            found[step] = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cifars_rate_falls_at_the_papers_iterations():
    at = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    assert rates(named("cifar"), 64_000, at) == pytest.approx(at)


def test_resnet_110_is_warmed_up_for_400_iterations():
    at = {0: 0.01, 399: 0.01, 400: 0.1, 31_999: 0.1, 32_000: 0.01, 48_000: 0.001}
    assert rates(named("cifar", model="resnet110"), 64_000, at) == pytest.approx(at)


def test_imagenets_rate_falls_after_30_and_60_epochs():
    epoch = 50  # steps; the paper's are 5004
    at = {0: 0.1, 30 * epoch - 1: 0.1, 30 * epoch: 0.01, 60 * epoch - 1: 0.01, 60 * epoch: 0.001}
    assert rates(named("imagenet"), 90 * epoch, at) == pytest.approx(at)


def test_a_cosine_rises_linearly_and_ends_near_zero():
    at = {0: 0.01, 5: 0.055, 10: 0.1, 55: 0.05, 99: 0.05 * (1 + math.cos(math.pi * 89 / 90))}
    assert rates(named("digits", schedule="cosine", warmup=0.1), 100, at) == pytest.approx(at)
    at = {0: 0.1, 50: 0.05}
    assert rates(named("digits", schedule="cosine"), 100, at) == pytest.approx(at)


def test_one_cycle_is_highest_after_its_warm_up():
    found = rates(named("digits"), 100, range(100))
    assert max(found, key=found.get) == 19
    assert found[19] == pytest.approx(0.1)
    assert found[99] < 1e-5


@pytest.mark.parametrize("changes", [{}, {"schedule": "steps", "warmup": 0.1}, {"schedule": "cosine", "warmup": 0.1}])
def test_a_rate_that_is_a_tensor_is_written_where_it_is(changes):
    recipe = named("digits", **changes)
    lr = torch.tensor(recipe.lr)
    assert rates(recipe, 50, range(50), lr) == pytest.approx(rates(recipe, 50, range(50)), abs=1e-7)
    assert lr != recipe.lr  # the same tensor
