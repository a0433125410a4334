"""Training with fused blocks beside stock, from one seed: the loss curves are one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet
from fused_resnet import models

STEPS = 50


@pytest.fixture(scope="module")
def task() -> tuple[Tensor, Tensor]:
    """Noisy pictures of ten patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (STEPS, 32), generator=generator)
    return patterns[labels] + 2 * torch.randn(STEPS, 32, 3, 16, 16, generator=generator), labels


@pytest.fixture(scope="module")
def curve(task):
    """The loss at every step, of a run that is made once."""

    @functools.cache
    def run(*, fused: bool, seed: int, autocast: bool) -> Tensor:
        torch.manual_seed(seed)
        model: nn.Module = models.create("resnet20").to(memory_format=torch.channels_last)
        if fused:
            fused_resnet.fuse(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        losses = []
        for images, labels in zip(*task, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    return run


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast-bf16"])
def test_a_fused_loss_curve_overlays_stocks(curve, autocast):
    stock, fused = curve(fused=False, seed=0, autocast=autocast), curve(fused=True, seed=0, autocast=autocast)
    assert stock[-10:].mean() < 0.6 * stock[:5].mean()  # it learns: there is something to overlay
    spread = (curve(fused=False, seed=1, autocast=autocast) - stock).abs()
    difference = (fused - stock).abs()
    assert difference.mean() <= spread.mean()
    # and before rounding errors have grown, far below it
    assert difference[:5].mean() <= 0.1 * spread[:5].mean()


def test_fused_and_stock_runs_overlap_over_three_seeds(curve):
    stock, fused = (
        torch.stack([curve(fused=f, seed=seed, autocast=False) for seed in range(3)]) for f in (False, True)
    )
    # ten steps at a time, the mean of the fused runs is within the range of the stock ones, widened to twice its width
    stock, fused = (losses.unfold(1, 10, 10).mean(2) for losses in (stock, fused))
    low, high = stock.amin(0), stock.amax(0)
    assert ((fused.mean(0) - (low + high) / 2).abs() <= high - low).all()
