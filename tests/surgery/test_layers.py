"""Which layers a chain takes for torch's own: subclasses that change nothing, frozen norms; and their neighbours."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support.oracle import assert_same_step, fuse, images, make


class Unit(nn.Module):
    def __init__(self, conv=None, norm=None, act=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False) if conv is None else conv
        self.bn = nn.BatchNorm2d(4) if norm is None else norm
        self.act = nn.ReLU() if act is None else act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Named(nn.Conv2d):
    """Another name and another way to be built."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3, padding=1, bias=False)
        self.gain = 2.0

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def extra_repr(self):
        return "named"

    def fan_in(self):
        return self.weight[0].numel()


class NamedNorm(nn.BatchNorm2d):
    pass


class NamedAct(nn.LeakyReLU):
    def __init__(self):
        super().__init__(0.3)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class DoubledInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Standardised(nn.Conv2d):
    """Weight standardisation, as a property in the place of the parameter."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.raw = nn.Parameter(torch.rand(4, 3, 3, 3))
        del self.weight

    @property
    def weight(self):
        return self.raw - self.raw.mean()


class Looked(nn.Conv2d):
    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value * 2 if name == "weight" else value


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def norm_without_bias():
    """``BatchNorm2d(bias=False)`` of torch 2.15, which leaves the parameter out."""
    norm = nn.BatchNorm2d(4)
    norm.register_parameter("bias", None)
    return norm


class BehindTheLayer(nn.Module):
    def _call_impl(self, *args):
        return 2 * super()._call_impl(*args)


class Mixed(nn.Conv2d, BehindTheLayer):
    """A class between the layer and nn.Module."""


class Compared(nn.Conv2d):
    """Equal to any other of its class."""

    def __eq__(self, other):
        return isinstance(other, Compared)

    def __hash__(self):
        return 1


PLAIN = {
    "norm without bias": lambda: Unit(norm=norm_without_bias()),
    "convolution": lambda: Unit(conv=Named(3, 4)),
    "norm": lambda: Unit(norm=NamedNorm(4)),
    "activation": lambda: Unit(act=NamedAct()),
    "all": lambda: Unit(Named(3, 4), NamedNorm(4), NamedAct()),
    "padding same": lambda: Unit(nn.Conv2d(3, 4, 3, padding="same")),
    "padding same, dilated": lambda: Unit(nn.Conv2d(3, 4, (3, 1), dilation=2, padding="same")),
    "padding valid": lambda: Unit(nn.Conv2d(3, 4, 3, padding="valid")),
}
OTHER = {
    "a forward of its own": lambda: Unit(conv=Doubled(3, 4, 3)),
    "a convolution of its own": lambda: Unit(conv=DoubledInside(3, 4, 3)),
    "a weight of its own": lambda: Unit(conv=Standardised(3, 4, 3)),
    "a look-up of its own": lambda: Unit(conv=Looked(3, 4, 3)),
    "a class behind it": lambda: Unit(conv=Mixed(3, 4, 3)),
    "an equality of its own": lambda: Unit(conv=Compared(3, 4, 3)),
    "more on one side": lambda: Unit(nn.Conv2d(3, 4, 2, padding="same")),
    "transposed": lambda: Unit(nn.ConvTranspose2d(3, 4, 2, stride=2)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_layer_that_computes_what_torchs_does_is_in_the_chain(name, training, chains_run):
    model = make(PLAIN[name]).train(training)
    fused = fuse(copy.deepcopy(model))
    assert_same_step(fused, model)
    assert len(chains_run) == 1
    assert fused_resnet.explain(fused).fused[0].what == "conv bn act"
    assert type(fused_resnet.unfuse(fused).conv) is type(model.conv)


@pytest.mark.parametrize("name", OTHER)
def test_behind_a_layer_that_computes_something_else_norm_and_activation_are_a_chain(name, chains_run):
    model = make(OTHER[name])
    fused = fuse(copy.deepcopy(model))
    assert_same_step(fused, model)
    assert len(chains_run) == 1
    assert fused_resnet.explain(fused).fused[0].what == "bn act"


class Descriptor:
    """A slope that is looked up, and no property."""

    def __get__(self, module, cls):
        return self if module is None else SLOPE["now"]


SLOPE = {"now": 0.7}


def test_a_slope_that_is_looked_up_is_seen(monkeypatch):
    cls = type("Described", (nn.LeakyReLU,), {"negative_slope": Descriptor(), "__init__": nn.Module.__init__})
    cls.inplace = False
    stock, fused = (make(lambda: Unit(act=cls())) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    monkeypatch.setitem(SLOPE, "now", 0.2)
    assert_same_step(fused, stock)


@pytest.mark.parametrize("method", ["_conv_forward", "__call__"])
def test_a_method_that_is_patched_later_is_seen(method, monkeypatch):
    stock, fused = (make(PLAIN["convolution"]) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    before = getattr(Named, method)
    monkeypatch.setattr(Named, method, lambda self, *args: before(self, *args) * 3, raising=False)
    assert_same_step(fused, stock)


def test_same_padding_with_a_stride_is_stocks_error():
    errors = []
    for fused in (False, True):
        model = make(PLAIN["padding same"])
        if fused:
            fuse(model)
        model.conv.stride = (2, 2)
        with pytest.raises(RuntimeError) as error:
            model(images())
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_norm_that_computes_something_else_is_stock(chains_run):
    model = make(lambda: Unit(norm=DoubledNorm(4)))
    assert_same_step(fuse(copy.deepcopy(model)), model)
    assert not chains_run


def test_a_class_that_is_patched_later_is_seen(monkeypatch):
    stock, fused = (make(PLAIN["convolution"]) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    monkeypatch.setattr(Named, "forward", lambda self, x: nn.Conv2d.forward(self, x) * 3)
    assert_same_step(fused, stock)


# ---- frozen norms


class Frozen(nn.Module):
    """What many packages have a copy of; its eps is written into the forward."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("weight", torch.rand(n) + 0.5)
        self.register_buffer("bias", torch.randn(n))
        self.register_buffer("running_mean", torch.randn(n))
        self.register_buffer("running_var", torch.rand(n) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


class FrozenWithEps(Frozen):
    def __init__(self, n):
        super().__init__(n)
        self.eps = 0.01

    def forward(self, x):
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return (x - self.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class FrozenOtherwise(Frozen):
    """It holds the same, and does something else with it."""

    def forward(self, x):
        return super().forward(x) * 2


class FrozenInEval(Frozen):
    def forward(self, x):
        return super().forward(x) * (1 if self.training else 2)


class FrozenWithAct(Frozen):
    def __init__(self, n):
        super().__init__(n)
        self.act = nn.Tanh()

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return self.act(x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1))


class FrozenByAnotherName(Frozen):
    """Each of these may have another eps."""

    def __init__(self, n, epsilon=1e-5):
        super().__init__(n)
        self.epsilon = epsilon

    def forward(self, x):
        scale = self.weight * (self.running_var + self.epsilon).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class FrozenAndHeard(Frozen):
    def forward(self, x):
        print("called")
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class FrozenButTrained(Frozen):
    def __init__(self, n):
        super().__init__(n)
        self.gain = nn.Parameter(torch.ones(n) * 2)

    def forward(self, x):
        return super().forward(x) * self.gain.view(1, -1, 1, 1)


@pytest.mark.parametrize("cls", [Frozen, FrozenWithEps])
def test_a_frozen_norm_is_known_by_what_it_holds_and_computes(cls, chains_run):
    model = make(lambda: Unit(norm=cls(4)))
    before = copy.deepcopy(model.state_dict())
    fused = fuse(copy.deepcopy(model))
    assert_same_step(fused, model)
    assert len(chains_run) == 1
    assert fused_resnet.explain(fused).fused[0].what == "conv bn act"
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())


@pytest.mark.parametrize(
    "cls",
    [FrozenOtherwise, FrozenButTrained, FrozenInEval, FrozenWithAct, FrozenByAnotherName, FrozenAndHeard],
)
def test_what_only_looks_like_a_frozen_norm_is_stock(cls, chains_run):
    model = make(lambda: Unit(norm=cls(4)))
    assert_same_step(fuse(copy.deepcopy(model)), model)
    assert not any("bn" in row.what for row in fused_resnet.explain(fuse(copy.deepcopy(model))).fused)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_norm_promotes_as_stocks_does(autocast):
    """Its buffers stay float32 where what it reads is a half."""
    model = make(lambda: Unit(norm=Frozen(4))).float()
    if not autocast:
        model.conv.bfloat16()
    fused = fuse(copy.deepcopy(model))
    x = images().float() if autocast else images().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = fused(x), model(x)
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_buffers_that_become_parameters_are_trained():
    stock, fused = (make(lambda: Unit(norm=Frozen(4))) for _ in range(2))
    fuse(fused)
    for model in (stock, fused):
        for name in ("weight", "running_mean"):
            value = model.bn._buffers.pop(name)
            model.bn.register_parameter(name, nn.Parameter(value))
    assert_same_step(fused, stock)


def test_a_network_on_meta_is_fused_without_data():
    with torch.device("meta"):
        model = Unit(norm=Frozen(4))
        assert fuse(model) is model


def test_a_frozen_norm_of_a_library_is_in_its_chain(chains_run):
    detr = pytest.importorskip("transformers.models.detr.modeling_detr", reason="transformers is not installed")
    model = make(lambda: Unit(norm=detr.DetrFrozenBatchNorm2d(4)))
    assert_same_step(fuse(copy.deepcopy(model)), model)
    assert len(chains_run) == 1


@pytest.mark.parametrize("change", ["eps", "running_var", "forward"])
def test_a_change_of_a_frozen_norm_is_seen(change, monkeypatch):
    stock, fused = (make(lambda: Unit(norm=FrozenWithEps(4))) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    for model in (stock, fused):
        if change == "eps":
            model.bn.eps = 0.1
        elif change == "running_var":
            model.bn.running_var.mul_(2)
    if change == "forward":
        monkeypatch.setattr(FrozenWithEps, "forward", lambda self, x: x * 3)
    assert_same_step(fused, stock)


# ---- children without norms of their own, which a trace goes into


class OwnAct(nn.Module):
    def __init__(self, beta=1.0):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return nn.functional.silu(x) if self.beta == 1.0 else x * torch.sigmoid(self.beta * x)


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.pointwise = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, x):
        return self.pointwise(self.depthwise(x))


class Noisy(nn.Module):
    """What cannot be gone into, beside what can."""

    def forward(self, x):
        print("called")
        return x * 1.5


class Whole(Unit):
    """More than one chain, so that no trace of it whole is one."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: Whole(act=OwnAct()), "conv bn silu"),
        (lambda: Whole(conv=Separable()), "conv.pointwise bn act"),
        (lambda: Whole(conv=Noisy(), norm=nn.BatchNorm2d(3), act=OwnAct()), "bn silu"),
        (lambda: Whole(act=OwnAct(0.5)), "conv bn"),
    ],
    ids=["activation", "separable convolution", "beside one that prints", "another branch"],
)
def test_a_child_beside_a_norm_is_gone_into(build, what, chains_run):
    model = make(build)
    fused = fuse(copy.deepcopy(model))
    assert_same_step(fused, model)
    assert [row.what for row in fused_resnet.explain(fused).fused] == [what]


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_what_a_child_was_read_for_is_a_guard(beta):
    stock, fused = (make(lambda: Whole(act=OwnAct(beta))) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    for model in (stock, fused):
        model.act.beta = 1.5 - beta
    assert_same_step(fused, stock)


# ---- chains of one mode


class DropsInTraining(nn.Module):
    """In eval all of it is one chain; in training its children's chains are their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Unit(), Unit(conv=nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x):
        x = self.first(x)
        if self.training:
            x = x * (torch.rand(len(x), 1, 1, 1, dtype=x.dtype) > 0.5)
        return self.second(x)


@pytest.mark.parametrize("fused_in", [True, False], ids=["fused in train", "fused in eval"])
@pytest.mark.parametrize(("training", "chains"), [(True, 2), (False, 1)])
def test_where_a_block_is_a_chain_in_one_mode_its_children_are_in_the_other(fused_in, training, chains, chains_run):
    stock, fused = (make(DropsInTraining) for _ in range(2))
    fuse(fused.train(fused_in))
    for model in (stock, fused):
        model.train(training)
    assert_same_step(fused, stock)
    assert len(chains_run) == chains


# ---- why a norm is left


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.bn = nn.Conv2d(3, 4, 1), nn.GELU(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.act(self.conv(x))).sin()


class Shared(Alone):
    def forward(self, x):
        return torch.relu(self.bn(self.bn(self.conv(x))))


class ReadTwice(Alone):
    def forward(self, x):
        x = self.conv(x)
        return self.bn(x).sin() * x


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Alone, "bn follows a GELU, and sin follows it"),
        (Shared, "bn is called more than once"),
        (ReadTwice, "bn follows a Conv2d, which others read, too, and sin follows it"),
    ],
)
def test_explain_names_the_neighbours_that_keep_a_norm_out(cls, reason):
    assert reason in str(fused_resnet.explain(fuse(make(cls))))
