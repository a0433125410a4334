"""One misfit costs one chain; deep stems under autocast are fused; a call that went stock can say why."""

import copy

import pytest
import torch
from torch import nn

import fused_resnet
from tests.support.changes import double_forward
from tests.support.oracle import assert_same_step, fuse, images, make


class Chains(nn.Module):
    """Three chains in one forward that a whole trace does not make one of."""

    def __init__(self, pool=None):
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c1, self.n1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c2, self.n2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.r0, self.r1, self.r2 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool = nn.MaxPool2d(2) if pool is None else pool
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.pool(self.r0(self.n0(self.c0(x))))
        x = torch.tanh(self.r1(self.n1(self.c1(x))))
        x = torch.tanh(self.r2(self.n2(self.c2(x))))
        return self.fc(x.mean((2, 3)))


def hook_on_a_convolution(model):
    model.c1.register_forward_hook(lambda m, args, out: out * 2)


def hook_on_a_norm(model):
    model.n1.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def hook_on_a_relu(model):
    model.r1.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))


def padding_same(model):
    model.c1 = nn.Conv2d(4, 4, 3, padding="same")


def padding_mode(model):
    model.c1 = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")


def other_activation(model):
    model.r1 = nn.GELU()


def other_norm(model):
    model.n1 = nn.GroupNorm(2, 4)


def subclass(model):
    model.c1 = type("Own", (nn.Conv2d,), {})(4, 4, 3, padding=1)


def own_forward(model):
    double_forward(model.c1)


MISFITS = [
    hook_on_a_convolution, hook_on_a_norm, hook_on_a_relu, padding_same, padding_mode, other_activation, other_norm,
    subclass, own_forward,
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("misfit", MISFITS, ids=lambda f: f.__name__)
def test_a_misfit_costs_its_own_chain_alone(misfit, when, training, chains_run):
    stock, model = make(Chains), make(Chains)
    for m in (stock, model):
        torch.manual_seed(3)
        if when == "after" and m is model:
            fuse(model)
        torch.manual_seed(3)
        misfit(m)
        m.double().train(training)
    fused = fuse(model) if when == "before" else model
    assert_same_step(fused, stock)
    assert len(chains_run) >= 2  # a norm and its ReLU, or a convolution and its norm, may still be one
    assert len(chains_run) == 3 or any(row.reason for row in fused_resnet.explain(fused).left)


POOLS = {
    "ceil mode": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "dilation": lambda: nn.MaxPool2d(2, dilation=2),
    "average": lambda: nn.AvgPool2d(2),
    "adaptive": lambda: nn.AdaptiveMaxPool2d(3),
    "a subclass": lambda: type("Own", (nn.MaxPool2d,), {})(2),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", POOLS)
def test_a_pool_never_takes_its_convolution_along(name, training, chains_run):
    stock = make(lambda: Chains(POOLS[name]())).train(training)
    assert_same_step(fuse(copy.deepcopy(stock)), stock)
    assert len(chains_run) == 3


@pytest.mark.parametrize("name", ["ceil mode", "average", "dilation"])
def test_a_pool_swapped_after_fuse_does_not_take_it_either(name, chains_run):
    stock, fused = make(Chains), fuse(make(Chains))
    for model in (stock, fused):
        model.pool = POOLS[name]()
    assert_same_step(fused, stock)
    assert len(chains_run) == 3
    assert "the pool is stock: pool" in str(fused_resnet.explain(fused))


def change_ceil_mode(pool):
    pool.ceil_mode = True


def hook_the_pool(pool):
    pool.register_forward_hook(lambda m, args, out: out * 2)


@pytest.mark.parametrize("change", [change_ceil_mode, hook_the_pool], ids=lambda f: f.__name__)
def test_a_pool_changed_after_fuse_does_not_take_it_either(change, chains_run):
    stock, fused = make(Chains), fuse(make(Chains))
    for model in (stock, fused):
        change(model.pool)
    assert_same_step(fused, stock)
    assert len(chains_run) == 3
    assert "the pool is stock: pool" in str(fused_resnet.explain(fused))


def stem(n: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(n):
        layers += [nn.Conv2d(4 if i else 3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1))


class Residual(nn.Module):
    """Its chains read what the stem gives in autocast's dtype, not what the module was given."""

    def __init__(self):
        super().__init__()
        self.stem, self.c, self.n = stem(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return torch.relu(self.n(self.c(x)) + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "build", [stem, lambda: nn.Sequential(stem(1), stem(1)[:0]), Residual], ids=["deep", "one", "res"]
)
def test_a_stem_under_autocast_is_fused(build, training, dtype, chains_run):
    stock = make(build).float().train(training)
    fused = fuse(copy.deepcopy(stock))
    x = images().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fused(x), stock(x)
    assert chains_run
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.1)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=0.05, atol=0.05)


CALLS = {
    "another dtype": lambda model, x: model(x.float()),
    "three dimensions": lambda model, x: model(x[0]),
    "a transform": lambda model, x: torch.func.vmap(model)(x[None]),
    "a hook": lambda model, x: (hook_on_a_convolution(model), model(x)),
    "all convolutions hooked": lambda model, x: (
        [c.register_forward_hook(lambda m, a, o: o * 2) for c in (model.c0, model.c1, model.c2)],
        model(x),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_explain_says_why_the_last_call_was_stock(name):
    fused = fuse(make(Chains)).eval()
    try:
        CALLS[name](fused, images())
    except (RuntimeError, ValueError):  # stock's own
        assert name in ("another dtype", "three dimensions")
    report = fused_resnet.explain(fused)
    assert any(row.reason for row in report.rows)


def test_a_reason_names_the_file_and_the_line():
    class Strange(Chains):
        def forward(self, x):
            try:
                x = super().forward(x)
            finally:
                self.seen = 1
            return x

    report = fused_resnet.explain(fuse(make(Strange)))
    assert any("test_misfits.py:" in row.reason for row in report.left)


def test_a_norm_without_running_statistics_moves_its_counter():
    def build():
        model = make(Chains)
        for norm in (model.n0, model.n2):
            norm.running_mean = norm.running_var = None
        return model

    stock, fused = build(), fuse(build())
    for model in (stock, fused):
        model(images())
    assert stock.n0.num_batches_tracked == fused.n0.num_batches_tracked
