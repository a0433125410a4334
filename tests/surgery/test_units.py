"""Units in classes of their own: a convolution, its norm and its activation in a child, joined by the forward."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support.oracle import assert_same_step, fuse, make


class ConvNormAct(nn.Module):
    """As timm has it: what may be missing is asked for by name."""

    def __init__(self, c_in, c_out, act=nn.ReLU):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), act()
        self.aa = None

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = self.aa(x)
        return x


class Gate(nn.Module):
    """What no chain can hold."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Gated(nn.Module):
    """RegNetY's block: two units, a gate, and a unit behind it whose sum has an activation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.gate = ConvNormAct(3, 4), ConvNormAct(4, 4), Gate(4)
        self.conv3, self.act3 = ConvNormAct(4, 3, nn.Identity), nn.ReLU()

    def forward(self, x):
        return self.act3(self.conv3(self.gate(self.conv2(self.conv1(x)))) + x)


class ActThenAdd(nn.Module):
    """DarkNet's block: the sum is behind the activation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = ConvNormAct(3, 4, nn.SiLU), ConvNormAct(4, 3, nn.SiLU)

    def forward(self, x):
        return self.conv2(self.conv1(x)) + x


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("cls", "chains"),
    [
        (
            Gated,
            ["conv1.conv conv1.bn conv1.act conv2.conv conv2.bn conv2.act", "conv3.conv conv3.bn + x act3"],
        ),
        (ActThenAdd, ["conv1.conv conv1.bn conv1.act conv2.conv conv2.bn conv2.act"]),
    ],
)
def test_units_of_several_children_are_one_chain(cls, chains, training, chains_run):
    model = make(cls).train(training)
    fused = fuse(copy.deepcopy(model))
    assert_same_step(fused, model)
    assert len(chains_run) == len(chains)
    assert [row.what for row in fused_resnet.explain(fused).fused] == chains


def test_what_is_between_two_units_of_a_chain_is_not_kept():
    """Stock and a fused child of its own keep it."""

    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            model(torch.randn(2, 3, 9, 9))
        return sizes.count((2, 4, 9, 9))

    model = ActThenAdd()
    assert kept(fused_resnet.fuse(copy.deepcopy(model))) == 1
    assert kept(model) > 1


CHANGES = {
    "a child swapped": lambda m: setattr(m, "conv2", ConvNormAct(4, 4, nn.Tanh).double()),
    "a layer swapped": lambda m: setattr(m.conv2, "act", nn.Tanh()),
    "what was missing": lambda m: setattr(m.conv1, "aa", nn.AvgPool2d(3, 1, 1)),
    "a hook on a child": lambda m: m.conv2.register_forward_hook(lambda mod, args, out: out * 2),
    "a child's own forward": lambda m: setattr(m.conv1, "forward", _wide),
    "a child in eval": lambda m: m.conv2.eval(),
}


def _wide(x):
    return torch.cat((x, x[:, :1]), 1)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_child_is_seen(name):
    stock, fused = (make(Gated) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    for model in (stock, fused):
        torch.manual_seed(1)
        CHANGES[name](model)
    assert_same_step(fused, stock)
