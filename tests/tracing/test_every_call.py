"""What one trace does not show happens in every call: coins, noise, side effects, checkpoints."""

import random

import pytest
import torch
from torch import Tensor

from tests.support.hand_written import Basic, images, make
from tests.support.oracle import fuse


class StochasticDepth(Basic):
    """Huang et al., 2016, as it is written by hand: a coin for every call."""

    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        return super().forward(x)


class TorchStochasticDepth(Basic):
    def forward(self, x):
        if self.training and torch.rand(()).item() < 0.5:
            return x
        return super().forward(x)


@pytest.mark.parametrize("cls", [StochasticDepth, TorchStochasticDepth])
def test_a_coin_is_tossed_at_every_call(cls):
    model, x = make(cls), images()
    fuse(model)
    skipped = [torch.equal(model(x), x) for _ in range(40)]
    assert 0 < sum(skipped) < 40


class Noisy(Basic):
    def forward(self, x):
        return super().forward(x) + torch.randn(1)


def test_noise_differs_from_call_to_call():
    model = make(Noisy).eval()
    fuse(model)
    assert not torch.equal(model(images()), model(images()))


class Remembers(Basic):
    """A forward with a side effect."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        self.features = super().forward(x)
        return self.features


def test_a_side_effect_of_a_forward_happens_at_every_call():
    model = make(Remembers)
    fuse(model)
    assert not hasattr(model, "features")
    z = model(images())
    assert model.features is z
    assert model.calls == 1
    assert model(images()) is model.features
    assert model.calls == 2


class Checkpointed(Basic):
    def forward(self, x):
        if self.training and torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


def test_a_block_that_checkpoints_itself_still_does():
    model, x = make(Checkpointed), images().requires_grad_()
    fuse(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    assert sum(t.numel() for t in saved if t.dim() == 4 and t.shape == x.shape) <= x.numel()
