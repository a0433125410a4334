"""Forwards with further arguments, by position and by name, and with a list of tensors."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support.oracle import fuse, images, make


class Decoder(nn.Module):
    """A decoder's block: a second argument that it needs."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x, skip):
        return self.act(self.bn(self.conv(torch.cat([x, skip], 1))))


class Optional(nn.Module):
    """A shortcut that may be another, and a factor; what is asked of the first is whether it is there."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.SiLU()

    def forward(self, x, shortcut=None, factor=1.0):
        if shortcut is None:
            shortcut = x
        return self.act(self.bn(self.conv(x)) + shortcut) * factor


class Sizes(Optional):
    """Numbers, of which nothing is asked."""

    def forward(self, x, height, width):
        x = x.flatten(2).view(-1, 3, height, width)
        return self.act(self.bn(self.conv(x)))


class Added(Optional):
    """What is added may be a number."""

    def forward(self, x, other):
        return self.act(self.bn(self.conv(x)) + other)


class Listed(nn.Module):
    """A layer of a DenseNet: one tensor, or a list of them."""

    def __init__(self):
        super().__init__()
        self.bn, self.act, self.conv = nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, xs):
        xs = [xs] if isinstance(xs, torch.Tensor) else xs
        return self.act(self.bn2(self.conv(self.act(self.bn(torch.cat(xs, 1))))))


class Children(nn.Module):
    """A root of DLA's: a list without being asked for it, and its first item again."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(6, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, xs: list[torch.Tensor]):
        x = self.bn(self.conv(torch.cat(xs, 1)))
        x += xs[0]
        return self.act(x)


X, Y = images(2, 3, 6, 6), images(2, 3, 6, 6).flip(0)
WIDE = images(2, 6, 6, 6)
CALLS = {
    "two": (Decoder, (X, Y), {}, 1),
    "the second by name": (Decoder, (X,), {"skip": Y}, 1),
    "both by name": (Decoder, (), {"skip": Y, "x": X}, 1),
    "default": (Optional, (X,), {}, 1),
    "optional": (Optional, (X, Y), {}, 1),
    "optional by name": (Optional, (X,), {"shortcut": Y}, 1),
    "optional, None": (Optional, (X, None), {}, 0),
    "another optional by name": (Optional, (X,), {"factor": 2.0}, 0),
    "numbers": (Sizes, (X, 9, 4), {}, 1),
    "numbers by name": (Sizes, (X,), {"width": 4, "height": 9}, 1),
    "a tensor to add": (Added, (X, Y), {}, 1),
    "a number to add": (Added, (X, 2.0), {}, 0),
    "a tensor where a list may be": (Listed, (WIDE,), {}, 1),
    "a list": (Listed, ([X, Y],), {}, 1),
    "a tuple": (Listed, ((X, Y),), {}, 0),
    "a list of one": (Listed, ([WIDE],), {}, 1),
    "a list, unasked": (Children, ([X, Y],), {}, 1),
}


def step(model, args, kwargs):
    """Run forward and backward; return the output, and the gradients of tensors, wherever they were, and parameters."""
    leaves = []

    def leaf(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(leaf, value))
        if not isinstance(value, torch.Tensor):
            return value
        leaves.append(value.clone().requires_grad_())
        return leaves[-1]

    model.zero_grad()
    z = model(*leaf(args), **{name: leaf(value) for name, value in kwargs.items()})
    z.square().sum().backward()
    return [z, *(t.grad for t in (*leaves, *model.parameters())), *model.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_stock_gives(name, training, chains_run):
    cls, args, kwargs, fused_chains = CALLS[name]
    model = make(cls).train(training)
    fused = fuse(copy.deepcopy(model))
    for a, b in zip(step(fused, args, kwargs), step(model, args, kwargs), strict=True):
        torch.testing.assert_close(a, b)
    assert len(chains_run) == fused_chains


class Unpacked(Optional):
    def forward(self, x, pair):
        first, second = pair
        return self.act(self.bn(self.conv(x)) + first * second)


class Written(Optional):
    """An argument changed in place, which may be the other."""

    def forward(self, x, other):
        h = self.conv(x)
        other.mul_(2)
        return self.act(self.bn(h))


class Seen(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 10 if func.__name__ in ("add", "__add__") else result


@pytest.mark.parametrize(
    "pair", [[X, Y], (X, Y), {0: 1, 1: 2}, torch.stack((X, Y))], ids=["list", "tuple", "dict", "tensor"]
)
def test_an_argument_is_taken_apart_as_stock_does(pair):
    model = make(Unpacked)
    torch.testing.assert_close(fuse(copy.deepcopy(model))(X, pair), model(X, pair))


def test_an_argument_that_is_another_one_too_may_be_written_to():
    model = make(Written)
    with torch.no_grad():
        results = []
        for m in (model, fuse(copy.deepcopy(model))):
            x = X.clone()
            results.append(m(x, x))
    torch.testing.assert_close(*results)


def test_an_argument_that_sees_torchs_calls_is_stocks():
    model = make(Added)
    other = Y.clone().as_subclass(Seen)
    ours, theirs = fuse(copy.deepcopy(model))(X, other), model(X, other)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 3, 6, 6), (5, 2, 3, 6, 6), (3, 1, 1)], ids=str)
def test_a_shortcut_is_broadcast_as_stock_does(shape):
    """Also where it is the larger one."""
    model, other = make(Added), torch.ones(shape, dtype=torch.float64)
    torch.testing.assert_close(fuse(copy.deepcopy(model))(X, other), model(X, other))


WRONG = {
    "nothing to add": (Added, (X, None), {}),
    "on another device": (Added, (X, Y.to("meta")), {}),
    "too many to take apart": (Unpacked, (X, (X, Y, Y)), {}),
    "too few": (Decoder, (X,), {}),
    "too many": (Decoder, (X, Y, Y), {}),
    "an unknown name": (Decoder, (X,), {"skipped": Y}),
    "one twice": (Decoder, (X, Y), {"skip": Y}),
    "an empty list": (Listed, ([],), {}),
    "a list of no tensors": (Listed, ([1],), {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_raises_what_stock_raises(name):
    cls, args, kwargs = WRONG[name]
    model = make(cls)
    errors = []
    for m in (model, fuse(copy.deepcopy(model))):
        with pytest.raises(Exception) as error:  # noqa: PT011 - whatever stock raises
            m(*args, **kwargs)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("cls", [Decoder, Optional, Listed])
def test_the_plans_for_every_call_are_pickled(cls):
    import io

    model = fuse(make(cls))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [plan.kinds for plan in loaded._fused.plans[True].others] == [
        plan.kinds for plan in model._fused.plans[True].others
    ]
    assert str(fused_resnet.explain(loaded)) == str(fused_resnet.explain(model))


def test_a_list_is_fused_in_the_network_that_hands_it_on(chains_run):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Listed(), Listed()
            self.two.bn, self.two.conv = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 1)

        def forward(self, x):
            features = [x]
            for layer in (self.one, self.two):
                features.append(layer(features))
            return torch.cat(features, 1)

    model = make(Dense)
    fused = fuse(copy.deepcopy(model))
    for a, b in zip(step(fused, (WIDE,), {}), step(model, (WIDE,), {}), strict=True):
        torch.testing.assert_close(a, b)
    assert len(chains_run) == 2
