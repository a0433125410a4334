"""The oracle notices a difference: planted faults, one of every kind that it compares."""

import pytest
import torch
import torch.nn.functional as F

import fused_resnet
from tests.support.oracle import forward

PLAIN = forward("return torch.relu(self.n0(self.c0(x)))")
WATCHED = forward(
    """
    SEEN.append(1)
    return torch.relu(self.n0(self.c0(x)))
    """,
    top="SEEN = []",
    more="""
    def watch(model):
        seen = list(SEEN)
        SEEN.clear()
        return seen
    """,
)
FLAGGED = forward(
    "return torch.relu(self.n0(self.c0(x))) * (2 if self.flag else 1)",
    init="self.flag = False",
    more="""
    def change(model, on):
        model.flag = on
    """,
)


def faulty(forward):
    """A fuse that swaps a forward for a wrong one."""

    def fuse(model, **options):
        stock = type(model).forward
        model.__class__ = type("Faulty", (type(model),), {"forward": lambda self, x: forward(self, x, stock)})
        return model

    return fuse


def detached(self, x, stock):
    return stock(self, x.detach())


def slightly_off(self, x, stock):
    return stock(self, x) * (1 + 1e-6)


def other_type(self, x, stock):
    return [stock(self, x)]


def counts(self, x, stock):
    self.n0.num_batches_tracked += 1
    return stock(self, x)


def prints(self, x, stock):
    print("fused")
    return stock(self, x)


def raises(self, x, stock):
    raise RuntimeError("fused")


def draws(self, x, stock):
    torch.rand(1)
    return stock(self, x)


def without_the_weight(self, x, stock):
    return torch.relu(self.n0(F.conv2d(x, self.c0.weight.detach(), self.c0.bias, padding=1)))


PLANTED = [detached, slightly_off, other_type, counts, prints, raises, draws, without_the_weight]


@pytest.mark.parametrize("fault", PLANTED, ids=lambda f: f.__name__)
def test_a_planted_fault_of_a_forward_is_noticed(same, monkeypatch, fault):
    monkeypatch.setattr(fused_resnet, "fuse", faulty(fault))
    monkeypatch.setattr(fused_resnet, "unfuse", lambda model: model)
    with pytest.raises(AssertionError):
        same(PLAIN)


def test_a_frozen_flag_is_noticed(same, monkeypatch):
    def frozen(self, x, stock):
        self.flag, now = False, self.flag
        try:
            return stock(self, x)
        finally:
            self.flag = now

    monkeypatch.setattr(fused_resnet, "fuse", faulty(frozen))
    with pytest.raises(AssertionError, match="changed"):
        same(FLAGGED)


def test_a_lost_side_effect_is_noticed(same, monkeypatch):
    def silent(self, x, stock):
        return torch.relu(self.n0(self.c0(x)))

    monkeypatch.setattr(fused_resnet, "fuse", faulty(silent))
    with pytest.raises(AssertionError, match=r"\.left"):
        same(WATCHED)


@pytest.mark.parametrize("name", ["fuse", "explain", "unfuse"])
@pytest.mark.parametrize("what", ["tensor", "mode", "attribute", "random numbers"])
def test_what_fuse_explain_or_unfuse_change_is_noticed(same, monkeypatch, name, what):
    function = getattr(fused_resnet, name)

    def changing(model, **options):
        result = function(model, **options)
        if what == "tensor":
            model.n0.num_batches_tracked.add_(0)  # the version alone
        elif what == "mode":
            model.relu.train(not model.relu.training)
        elif what == "attribute":
            model.left_behind = 1
        else:
            torch.rand(1)
        return result

    monkeypatch.setattr(fused_resnet, name, changing)
    with pytest.raises(AssertionError, match=f"{name} changed"):
        same(PLAIN)


@pytest.mark.parametrize("source", [PLAIN, WATCHED, FLAGGED], ids=["plain", "watched", "flagged"])
def test_stock_is_the_same_as_stock(same, monkeypatch, source):
    for name in ("fuse", "explain", "unfuse"):
        monkeypatch.setattr(fused_resnet, name, lambda model, **options: model)
    same(source)


def test_a_plain_forward_is_fused_and_the_same(same):
    same(PLAIN, least=1)
