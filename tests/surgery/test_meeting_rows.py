"""Two rows that meet in one add, neither of them a single convolution and norm."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.oracle import assert_same_step, fuse, images, make


class OwnConv(nn.Conv2d):
    """A subclass that changes nothing."""


class Standardized(nn.Conv2d):
    """A subclass that does: its weights are standardized."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Branches(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module, join=lambda a, b: F.relu(a + b)):
        super().__init__()
        self.a, self.b, self.join = a, b, join

    def forward(self, x):
        return self.join(self.a(x), self.b(x))


class Written(nn.Module):
    """The same in one forward."""

    def __init__(self, conv=nn.Conv2d, second: bool = True):
        super().__init__()
        self.c1, self.n1, self.c2, self.n2 = conv(3, 3, 3, padding=1), norm(), conv(3, 3, 3, padding=1), norm()
        self.c3, self.n3, self.c4, self.n4 = conv(3, 3, 3, padding=1), norm(), conv(3, 3, 3, padding=1), norm()

    def forward(self, x):
        a = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        b = self.n4(self.c4(F.relu(self.n3(self.c3(x)))))
        return F.relu(a + b)


class WrittenInPlace(Written):
    def forward(self, x):
        a = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        a += self.n4(self.c4(F.relu(self.n3(self.c3(x)))))
        return F.relu_(a)


class BareNorms(Written):
    """The shortest."""

    def forward(self, x):
        return F.relu(self.n1(x) + self.n2(x))


class BareNormsNoRelu(Written):
    def forward(self, x):
        return self.n1(x) + self.n2(x)


class NormsOfOne(Written):
    """Two norms of one convolution."""

    def forward(self, x):
        y = self.c1(x)
        return F.relu(self.n1(y) + self.n2(y))


class RepVgg(Written):
    """conv-bn, 1×1 conv-bn and bn meet in two adds."""

    def forward(self, x):
        return F.relu(self.n1(self.c1(x)) + self.n2(self.c2(x)) + self.n3(x))


class ThreeRows(Written):
    def forward(self, x):
        a = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        return F.relu(a + (self.n3(self.c3(x)) + self.n4(self.c4(x))))


class WithItself(Written):
    def forward(self, x):
        a = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        return F.relu(a + a)


class SumUsedTwice(Written):
    def forward(self, x):
        s = self.n2(self.c2(F.relu(self.n1(self.c1(x))))) + self.n4(self.c4(F.relu(self.n3(self.c3(x)))))
        return F.relu(s), s


class AddedTwice(Written):
    """Each row in two adds."""

    def forward(self, x):
        a, b = self.n2(self.c2(F.relu(self.n1(self.c1(x))))), self.n4(self.c4(x))
        return F.relu(a + b), F.relu(b + a + x)


def norm() -> nn.Module:
    return nn.BatchNorm2d(3)


def conv(cls=nn.Conv2d) -> nn.Module:
    return cls(3, 3, 3, padding=1)


def deep(cls=nn.Conv2d) -> nn.Module:
    return nn.Sequential(conv(), norm(), nn.ReLU(), conv(cls), norm())


def single(cls=nn.Conv2d) -> nn.Module:
    return nn.Sequential(conv(cls), norm())


VARIANTS = {
    "two branches of conv-bn-relu-conv-bn": lambda: Branches(deep(), deep()),
    "one of them longer": lambda: Branches(nn.Sequential(deep(), nn.ReLU(), deep()), deep()),
    "ConvTranspose2d in front of both norms": lambda: Branches(single(nn.ConvTranspose2d), single(nn.ConvTranspose2d)),
    "ConvTranspose2d in front of one norm": lambda: Branches(single(nn.ConvTranspose2d), deep()),
    "a subclass of Conv2d in front of both": lambda: Branches(single(OwnConv), single(OwnConv)),
    "a subclass with a forward in front of both": lambda: Branches(single(Standardized), single(Standardized)),
    "a subclass in front of one": lambda: Branches(deep(), single(Standardized)),
    "bare norms in containers": lambda: Branches(norm(), norm()),
    "a bare norm and a row": lambda: Branches(norm(), deep()),
    "torch.add": lambda: Branches(deep(), deep(), lambda a, b: torch.relu(torch.add(a, b))),
    "the method": lambda: Branches(deep(), deep(), lambda a, b: a.add(b).relu()),
    "in place": lambda: Branches(deep(), deep(), lambda a, b: a.add_(b).relu_()),
    "no relu": lambda: Branches(deep(), deep(), lambda a, b: b + a),
    "with alpha": lambda: Branches(deep(), deep(), lambda a, b: F.relu(torch.add(a, b, alpha=2))),
    "a difference": lambda: Branches(deep(), deep(), lambda a, b: F.relu(a - b)),
    "written in one forward": Written,
    "written in place": WrittenInPlace,
    "written, ConvTranspose2d": lambda: Written(nn.ConvTranspose2d),
    "written, a subclass": lambda: Written(Standardized),
    "written, two bare norms": BareNorms,
    "written, two bare norms, no relu": BareNormsNoRelu,
    "two norms of one convolution": NormsOfOne,
    "RepVGG": RepVgg,
    "three rows": ThreeRows,
    "a row and itself": WithItself,
    "the sum is used twice": SumUsedTwice,
    "each row in two adds": AddedTwice,
    "one module for both rows": lambda: (lambda m: Branches(m, m))(deep()),
}


@pytest.mark.parametrize("chain", ["block", "stage"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", VARIANTS)
def test_two_rows_meet_in_one_add(name, training, chain):
    stock = make(VARIANTS[name]).train(training)
    fused = fuse(copy.deepcopy(stock), chain=chain)
    for _ in range(2):
        assert_same_step(fused, stock, images(2, 3, 6, 6))


@pytest.mark.parametrize("name", ["two branches of conv-bn-relu-conv-bn", "written in one forward"])
def test_an_add_has_one_owner_and_both_rows_are_fused(name, chains_run):
    fuse(make(VARIANTS[name]))(images(2, 3, 6, 6))
    assert len(chains_run) == 2


class OntoAnother(Written):
    """The sum is written into what another module gave, which may be its input: the chain ends in front of it."""

    def __init__(self, other=nn.Identity):
        super().__init__()
        self.other = other()

    def forward(self, x):
        y = x * 1
        z = self.other(y)
        z += self.n1(self.c1(x))
        return z, y


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("other", [nn.Identity, nn.Flatten, nn.Sigmoid, lambda: nn.Sequential(nn.Identity())])
def test_a_sum_that_is_written_into_another_tensor_is_seen_there(other, training, chains_run):
    stock = make(lambda: OntoAnother(lambda: nn.Flatten(0, 0) if other is nn.Flatten else other())).train(training)
    assert_same_step(fuse(copy.deepcopy(stock)), stock)
    assert len(chains_run) == 1
