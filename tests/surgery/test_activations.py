"""Activations by every name that a forward has for them, in modules of torch's and of timm's, and what is none."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from tests.support.oracle import assert_same_step, fuse, images, make

MODULES = {
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "Hardtanh": lambda: nn.Hardtanh(-0.5, 0.7),
    "LeakyReLU": lambda: nn.LeakyReLU(0.3),
    "LeakyReLU that grows": lambda: nn.LeakyReLU(1.5),
    "LeakyReLU that falls": lambda: nn.LeakyReLU(-0.25),
    "SiLU": nn.SiLU,
    "Hardswish": nn.Hardswish,
    "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU("tanh"),
    "in place": lambda: nn.SiLU(inplace=True),
}
FUNCTIONS = {
    "F.relu6": F.relu6,
    "F.hardtanh": F.hardtanh,
    "F.hardtanh with bounds": lambda x: F.hardtanh(x, -0.5, max_val=0.25),
    "F.hardtanh_": F.hardtanh_,
    "F.leaky_relu": F.leaky_relu,
    "F.leaky_relu with a slope": lambda x: F.leaky_relu(x, 0.3),
    "F.leaky_relu by keyword": lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
    "F.leaky_relu_": F.leaky_relu_,
    "F.silu": F.silu,
    "F.silu in place": lambda x: F.silu(x, inplace=True),
    "F.hardswish": F.hardswish,
    "F.gelu": F.gelu,
    "F.gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Functional(nn.Module):
    """A function behind a norm, and the same behind an add."""

    def __init__(self, act):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3)
        self.act = act

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + x)


class Called(Functional):
    """With the function by its own name: one that stands in ``self`` is not looked into."""

    def forward(self, x):
        return F.silu(self.bn2(self.conv2(F.leaky_relu(self.bn1(self.conv1(x)), 0.2))) + x)


_function = None


def named(function):
    """Return a class whose forward calls a function that stands in its module's globals."""

    def forward(self, x):
        return _function(self.bn2(self.conv2(_function(self.bn1(self.conv1(x))))) + x)

    globals()["_function"] = function
    return type("Named", (Functional,), {"forward": forward})(None)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_an_activation_in_a_module_is_in_the_chain(name, training, chains_run):
    model = make(lambda: Functional(MODULES[name]())).train(training)
    fused = fuse(copy.deepcopy(model))
    assert_same_step(fused, model)
    assert len(chains_run) == 1
    assert fused_resnet.explain(fused).fused[0].what == "conv1 bn1 act conv2 bn2 + x act"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_that_is_a_function_is_in_the_chain(name, chains_run):
    model = make(lambda: named(FUNCTIONS[name]))
    fused = fuse(copy.deepcopy(model))
    assert_same_step(fused, model)
    assert len(chains_run) == 1
    ((block,),) = (blocks for blocks, _ in chains_run)
    assert block[0][0][-1][0] > 1  # the kind of the activation: neither none nor a ReLU


def test_a_function_is_described_by_its_name():
    what = fused_resnet.explain(fuse(make(lambda: Called(None)))).fused[0].what
    assert what == "conv1 bn1 leaky_relu(0.2) conv2 bn2 + x silu"


def test_a_plan_of_an_earlier_commit_has_its_relu(chains_run):
    """It knew one activation that is a function, and kept it without a name."""

    class Relu(Functional):
        def forward(self, x):
            return F.relu(self.bn1(self.conv1(x)))

    model = make(lambda: Relu(None))
    fused = fuse(copy.deepcopy(model))
    for training, plan in fused._fused.plans.items():
        restore, (chains, *rest) = plan.__reduce__()
        ((block,),) = chains
        (unit,) = block.units
        old = block._replace(units=(unit._replace(act="function"),))
        fused._fused.plans[training] = restore(((old,),), *rest[:5])
    assert_same_step(fused, model)
    assert len(chains_run) == 1


OTHERS = {
    "Mish": nn.Mish,
    "PReLU": nn.PReLU,
    "Sigmoid": nn.Sigmoid,
    "a subclass that computes": lambda: type("Own", (nn.SiLU,), {"forward": lambda self, x: x.cos()})(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_activation_runs_behind_a_chain_without_it(name, chains_run):
    model = make(lambda: Functional(OTHERS[name]()))
    assert_same_step(fuse(copy.deepcopy(model)), model)
    assert chains_run
    assert all(unit[-1][0] == 0 for blocks, _ in chains_run for block in blocks for unit in block[0])


def test_a_slope_that_the_forward_computes_is_stocks(chains_run):
    class Computed(Functional):
        def forward(self, x):
            return F.leaky_relu(self.bn1(self.conv1(x)), x.shape[2] / 10)

    model = make(lambda: Computed(None))
    assert_same_step(fuse(copy.deepcopy(model)), model)


@pytest.mark.parametrize(
    "change",
    [
        lambda act: setattr(act, "negative_slope", 0.7),
        lambda act: setattr(act, "inplace", True),
        lambda act: act.register_forward_hook(lambda m, args, out: out * 2),
        lambda act: setattr(act, "forward", torch.sin),
    ],
    ids=["slope", "inplace", "hook", "forward"],
)
def test_a_change_of_an_activation_is_seen(change):
    stock, fused = (make(lambda: Functional(nn.LeakyReLU(0.1))) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    for model in (stock, fused):
        change(model.act)
    assert_same_step(fused, stock)


def test_an_activation_may_be_swapped_for_another(chains_run):
    stock, fused = (make(lambda: Functional(nn.ReLU())) for _ in range(2))
    fuse(fused)
    for model in (stock, fused):
        model.act = nn.Hardswish()
    assert_same_step(fused, stock)
    assert len(chains_run) == 1
    fused.act = nn.Mish()
    assert "act is a Mish, not one of ReLU, ReLU6, " in str(fused_resnet.explain(fused))


@pytest.mark.parametrize("name", ["hardtanh", "silu", "gelu"])
def test_a_patched_function_is_seen(name, monkeypatch):
    stock, fused = (make(lambda: Functional(nn.GELU() if name == "gelu" else nn.SiLU())) for _ in range(2))
    fuse(fused)
    monkeypatch.setattr(F, name, lambda x, *args, **kwargs: x.sin())
    assert_same_step(fused, stock)


# ---- dropouts in between


class Dropped(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.drop, self.act = nn.Dropout(p), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(self.bn(self.conv(x))))


@pytest.mark.parametrize("fused_in", [True, False], ids=["fused in train", "fused in eval"])
@pytest.mark.parametrize(("p", "training", "whole"), [(0.0, True, True), (0.5, False, True), (0.5, True, False)])
def test_a_dropout_that_drops_nothing_is_no_hindrance(p, training, whole, fused_in, chains_run):
    stock, fused = (make(lambda: Dropped(p)) for _ in range(2))
    fuse(fused.train(fused_in))
    for model in (stock, fused):
        model.train(training)
    assert_same_step(fused, stock)
    assert [blocks[0][0][0][-1][0] != 0 for blocks, _ in chains_run] == [whole]


@pytest.mark.parametrize("change", [lambda m: setattr(m.drop, "p", 0.5), lambda m: setattr(m, "drop", nn.Tanh())])
def test_a_dropout_that_changes_is_seen(change):
    stock, fused = (make(lambda: Dropped(0.0)) for _ in range(2))
    fuse(fused)
    for model in (stock, fused):
        change(model)
    assert_same_step(fused, stock)


# ---- timm's norms with their activations


def norm_act(**options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return functools.partial(timm.layers.BatchNormAct2d, **options)


class ConvNormAct(nn.Module):
    """timm's convolution, norm and activation, twice; the second without an activation, in front of an add."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 1, bias=False), norm(3, apply_act=False)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", ["relu", "silu", "leaky_relu", "hard_swish", "relu6", "gelu", "gelu_tanh"])
def test_a_norm_of_timms_is_a_norm_and_its_activation(act, training, chains_run):
    model = make(lambda: ConvNormAct(norm_act(act_layer=act))).train(training)
    fused = fuse(copy.deepcopy(model))
    assert_same_step(fused, model)
    assert len(chains_run) == 1
    assert fused_resnet.explain(fused).fused[0].what == "conv1 bn1 conv2 bn2 + x act"
    assert type(fused_resnet.unfuse(fused).bn1) is type(model.bn1)


@pytest.mark.parametrize("drop", [lambda: nn.Dropout(0.0), lambda: nn.Dropout(0.5)], ids=["p=0", "p=0.5"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_dropout_in_a_norm_of_timms_is_its_own(drop, training, chains_run):
    model = make(lambda: ConvNormAct(norm_act(drop_layer=drop))).train(training)
    assert_same_step(fuse(copy.deepcopy(model)), model)
    drops = training and model.bn1.drop.p > 0
    assert bool(chains_run) is not drops


CHANGES = {
    "activation": lambda m: setattr(m.bn1, "act", nn.SiLU()),
    "another activation": lambda m: setattr(m.bn1, "act", nn.Tanh()),
    "no activation": lambda m: setattr(m.bn1, "act", nn.Identity()),
    "an activation where there was none": lambda m: setattr(m.bn2, "act", nn.ReLU()),
    "dropout": lambda m: setattr(m.bn1, "drop", nn.Dropout(0.5)),
    "another module in its place": lambda m: setattr(m.bn1, "drop", nn.Tanh()),
    "a hook on the activation": lambda m: m.bn1.act.register_forward_hook(lambda mod, args, out: out * 2),
    "a plain norm": lambda m: setattr(m, "bn1", nn.BatchNorm2d(4).double()),
    "eval": lambda m: m.bn1.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_norm_of_timms_is_seen(name):
    stock, fused = (make(lambda: ConvNormAct(norm_act())) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    for model in (stock, fused):
        CHANGES[name](model)
    assert_same_step(fused, stock)


def test_a_patched_norm_of_timms_is_seen(monkeypatch):
    stock, fused = (make(lambda: ConvNormAct(norm_act())) for _ in range(2))
    fuse(fused)
    assert_same_step(fused, stock)
    monkeypatch.setattr(type(stock.bn1), "forward", lambda self, x: x.cos())
    assert_same_step(fused, stock)


@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_that_timm_freezes_are_in_their_chains(when, chains_run):
    norm = norm_act()
    from timm.layers import freeze_batch_norm_2d

    stock, fused = (make(lambda: ConvNormAct(norm)) for _ in range(2))
    if when == "before":
        fuse(freeze_batch_norm_2d(fused))
    else:
        freeze_batch_norm_2d(fuse(fused))
    freeze_batch_norm_2d(stock)
    assert_same_step(fused, stock)
    assert len(chains_run) == 1


def test_norms_that_timm_synchronises_are_in_their_chains(chains_run):
    """In one process; stock's own refuse the CPU's tensors, so that the model before is what they are held to."""
    norm = norm_act()
    from timm.layers import convert_sync_batchnorm

    stock, fused = (make(lambda: ConvNormAct(norm)) for _ in range(2))
    convert_sync_batchnorm(fuse(fused))
    assert type(fused.bn1).__name__ == "SyncBatchNormAct"
    x = images(2, 3, 6, 6)
    torch.testing.assert_close(fused(x), stock(x))
    assert len(chains_run) == 1
