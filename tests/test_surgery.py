"""fuse, unfuse and explain: what is found, what is left stock, and what changes after fuse are honoured."""

import copy
import functools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet
from fused_resnet import models
from fused_resnet.blocks import FusedModule
from fused_resnet.surgery import NothingToFuse
from tests.support.accuracy import assert_fused_is_as_accurate_as_stock, outputs_of
from tests.support.networks import through_file, through_pickle

# ---- hand-written blocks ---------------------------------------------------------------------------------------------


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)


class Basic(nn.Module):
    """The block as everyone writes it."""

    def __init__(self, c_in: int = 8, c_out: int = 8, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(c_in, c_out, stride), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = conv3x3(c_out, c_out), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Functional(Basic):
    """F.relu, keyword arguments, torch.add, the shortcut first in the sum."""

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = torch.add(shortcut, self.bn2(self.conv2(out)))
        return torch.relu(out)


class Method(Basic):
    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).add(x)
        return out.relu()


class PreActivation(Basic):
    """Identity mappings: bn → relu → conv, twice, and no ReLU behind the add."""

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x


class PreActivationInPlace(Basic):
    def forward(self, x):
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        return out + x


class OptionA(Basic):
    """The CIFAR shortcut without parameters: every other pixel, zeros for the new channels."""

    def __init__(self):
        super().__init__(8, 16, 2)
        self.downsample = None

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return F.relu(out)


class OptionAOfAnother(OptionA):
    """The shortcut starts from another tensor than the convolutions."""

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x.sin())))))
        return F.relu(out + F.pad(x.cos()[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


class Function(nn.Module):
    """A layer made of a function, as CIFAR networks have it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class FunctionShortcut(Basic):
    def __init__(self, function=lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)):
        super().__init__(8, 16, 2)
        self.downsample = Function(function)


class LinearEnd(Basic):
    """No ReLU behind the add."""

    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


class ChangesItsInput(Basic):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x = x * 1
        x += out
        return self.relu(x)


class InPlaceBefore(Basic):
    """The in-place ReLU at the front changes the shortcut, too."""

    def forward(self, x):
        x = x + 0
        out = self.bn1(self.conv1(self.relu(x)))
        return self.relu(out + x)


class InnerOutput(Basic):
    """An inner activation has a second consumer."""

    def forward(self, x):
        inner = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(inner)) + x), inner


class RawOutput(Basic):
    """A convolution's output has a second consumer."""

    def forward(self, x):
        raw = self.conv1(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(raw)))) + x + raw.mean())


class ConvTwice(Basic):
    """One convolution, two places."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv1(out)) + x)


class NormTwice(Basic):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn1(self.conv2(out)) + x)


class Scaled(Basic):
    """The residual is scaled: alpha belongs to the add."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(torch.add(x, self.bn2(self.conv2(out)), alpha=0.5))


class Broadcast(Basic):
    """What is added has another shape."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.position)


class SqueezeExcite(Basic):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out * self.fc(F.adaptive_avg_pool2d(out, 1)).sigmoid()
        return F.relu(out + x)


class BranchOnShape(Basic):
    def forward(self, x):
        if x.shape[2] > 4:
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


class BranchOnType(Basic):
    """Takes a tensor or a list of one: an isinstance that a tracer's stand-in must not answer wrongly."""

    def forward(self, x):
        x = x * 1 if isinstance(x, Tensor) else x[0]
        return super().forward(x)


class TensorConstant(Basic):
    def forward(self, x):
        return super().forward(x) * torch.tensor(2.0)


class InfiniteBound(Basic):
    def forward(self, x):
        return super().forward(x).clamp(0.5, float("inf"))


class LocalFunction(Basic):
    def forward(self, x):
        def twice(t):
            return t + t

        return twice(super().forward(x))


class Lambda(Basic):
    """An activation that is a function kept in an attribute."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.activation = activation

    def forward(self, x):
        out = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(out)) + x)


class Nested(nn.Module):
    """conv → norm → act triples in containers of their own."""

    class Triple(nn.Module):
        def __init__(self, act: bool):
            super().__init__()
            self.conv, self.norm = conv3x3(8, 8), nn.BatchNorm2d(8)
            self.act = nn.ReLU() if act else nn.Identity()

        def forward(self, x):
            return self.act(self.norm(self.conv(x)))

    def __init__(self):
        super().__init__()
        self.a, self.b, self.end = Nested.Triple(True), Nested.Triple(False), nn.ReLU()

    def forward(self, x):
        return self.end(self.b(self.a(x)) + x)


class Stem(nn.Module):
    def __init__(self, pool: nn.Module):
        super().__init__()
        self.conv, self.bn, self.relu, self.pool = nn.Conv2d(8, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(True), pool

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


class WithoutConvolution(nn.Module):
    """bn → relu → (+) without a convolution in front."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(self.bn(x) + x)


class InSequential(nn.Sequential):
    def __init__(self, *rest):
        super().__init__(conv3x3(8, 8), nn.BatchNorm2d(8), nn.ReLU(), *rest)


def make(cls, *args) -> nn.Module:
    torch.manual_seed(0)
    model = cls(*args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def images(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape or (2, 8, 6, 6), generator=torch.Generator().manual_seed(seed))


# what one forward is found to hold: chains that run in one call
HAND_WRITTEN = {
    "basic": (Basic, (), 1),
    "basic with projection": (Basic, (8, 16, 2), 1),
    "functional": (Functional, (), 1),
    "functional with projection": (Functional, (8, 16, 2), 1),
    "tensor methods": (Method, (), 1),
    "pre-activation": (PreActivation, (), 1),
    "pre-activation in place": (PreActivationInPlace, (), 1),
    "option A": (OptionA, (), 1),
    "option A of another tensor": (OptionAOfAnother, (), 1),
    "option A in a layer of its own": (FunctionShortcut, (), 1),
    "option A of ours": (models.BasicBlock, (8, 16, 2, models.ZeroPadded(8, 2)), 1),
    "option A of ours, bottleneck": (models.Bottleneck, (8, 4, 2, models.ZeroPadded(8, 2)), 1),
    "strides without zeros": (models.BasicBlock, (8, 8, 2, models.ZeroPadded(0, 2)), 1),
    "no relu behind the add": (LinearEnd, (), 1),
    "sum in place into the input": (ChangesItsInput, (), None),
    "in-place relu before": (InPlaceBefore, (), None),
    "inner output": (InnerOutput, (), 2),
    "raw output": (RawOutput, (), None),
    "conv twice": (ConvTwice, (), None),
    "norm twice": (NormTwice, (), None),
    "scaled residual": (Scaled, (), None),
    "broadcast residual": (Broadcast, (), None),
    "squeeze and excite": (SqueezeExcite, (), None),
    "branch on shape": (BranchOnShape, (), None),
    "branch on type": (BranchOnType, (), None),
    "tensor constant": (TensorConstant, (), None),
    "infinite bound": (InfiniteBound, (), None),
    "local function": (LocalFunction, (), None),
    "function in an attribute": (Lambda, (), None),
    "nested containers": (Nested, (), 1),
    "stem": (Stem, (nn.MaxPool2d(3, 2, 1),), 1),
    "stem, pool without overlap": (Stem, (nn.MaxPool2d(2),), 1),
    "stem, ceil mode": (Stem, (nn.MaxPool2d(2, ceil_mode=True),), None),
    "stem, average pool": (Stem, (nn.AvgPool2d(2),), None),
    "without a convolution": (WithoutConvolution, (), 1),
    "sequential": (InSequential, (), 1),
    "sequential with more": (InSequential, (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 3)), 1),
    "sequential of blocks": (nn.Sequential, (Basic(), Basic(8, 16, 2)), 2),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_hand_written_block_is_as_accurate_as_stock(name, training, chains_run):
    cls, args, chains = HAND_WRITTEN[name]
    model = make(cls, *args).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        assert_fused_is_as_accurate_as_stock(model, *(images(seed=seed) for seed in range(3)))
    if chains is not None:
        assert len(chains_run) == 3 * chains


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_unfuse_gives_a_hand_written_block_back_bit_for_bit(name):
    cls, args, _ = HAND_WRITTEN[name]
    model = make(cls, *args)
    expected, classes = copy.deepcopy(model), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        assert fused_resnet.unfuse(fused_resnet.fuse(model)) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    for a, b in zip(outputs_of(model(images())), outputs_of(expected(images())), strict=True):
        assert torch.equal(a, b)


# ---- forwards that a trace does not show -----------------------------------------------------------------------------


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        fused_resnet.fuse(model)
    skipped = [torch.equal(model(x), x) for _ in range(40)]
    assert 0 < sum(skipped) < 40


class Noisy(Basic):
    def forward(self, x):
        return super().forward(x) + torch.randn(1)


def test_noise_differs_from_call_to_call():
    model = make(Noisy).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        fused_resnet.fuse(model)
    assert not torch.equal(model(images()), model(images()))


class Remembers(Basic):
    """A forward with a side effect."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        self.features = super().forward(x)
        return self.features


def test_a_side_effect_of_a_forward_happens_at_every_call():
    model = make(Remembers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        fused_resnet.fuse(model)
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        fused_resnet.fuse(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    assert sum(t.numel() for t in saved if t.dim() == 4 and t.shape == x.shape) <= x.numel()


def test_fuse_leaves_random_numbers_and_modes_alone():
    model = nn.Sequential(make(Basic), make(Basic).eval())
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    fused_resnet.fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


def test_a_block_in_two_places_is_fused_once(chains_run):
    block = make(Basic)
    model = nn.Sequential(nn.Sequential(block), nn.Sequential(block))
    assert_fused_is_as_accurate_as_stock(model, images())
    assert len(chains_run) == 2
    assert type(fused_resnet.unfuse(fused_resnet.fuse(model))[0][0]) is Basic


def test_a_frozen_norm_without_eps_is_honoured():
    class FrozenBatchNorm2d(nn.Module):  # as in DETR, where eps is a constant of the forward
        def __init__(self):
            super().__init__()
            for name, value in (("weight", 1.5), ("bias", 0.2), ("running_mean", 0.3), ("running_var", 0.7)):
                self.register_buffer(name, torch.full((8,), value))

        def forward(self, x):
            w, b, m, v = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var))
            scale = w * (v + 1e-5).rsqrt()
            return x * scale + (b - m * scale)

    model = make(Basic)
    model.bn1, model.bn2 = FrozenBatchNorm2d(), FrozenBatchNorm2d()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        assert_fused_is_as_accurate_as_stock(model, images())


# ---- changes after fuse ----------------------------------------------------------------------------------------------


def swap_activation(block):
    block.relu = nn.GELU()


def swap_for_relu6(block):
    block.relu = nn.ReLU6()


def swap_norm(block):
    block.bn1 = nn.GroupNorm(2, 16)


def sync_norm(block):
    block.bn1 = nn.SyncBatchNorm.convert_sync_batchnorm(block.bn1).eval()


def norm_in_eval(block):
    block.bn1.eval()


def eps_and_momentum(block):
    block.bn1.eps, block.bn2.momentum = 0.5, 0.9


def no_momentum(block):
    block.bn1.momentum = None


def untracked(block):
    block.bn1 = nn.BatchNorm2d(16, track_running_stats=False)
    block.bn2.track_running_stats = False


def not_affine(block):
    block.bn2 = nn.BatchNorm2d(16, affine=False)


def stride_pair(block):
    block.conv1.stride = (1, 1)
    block.downsample[0].stride = (1, 1)


def stride_int(block):
    block.conv1.stride = 1
    block.downsample[0].stride = 1


def stride_list(block):
    block.conv1.stride = [1, 1]
    block.downsample[0].stride = [1, 1]


def dilation(block):
    block.conv2.dilation = block.conv2.padding = (2, 2)


def dilation_int(block):
    block.conv2.dilation = block.conv2.padding = 2


def padding_mode(block):
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")


def padding_same(block):
    block.conv2 = nn.Conv2d(16, 16, 3, padding="same")


def with_bias(block):
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1)


def grouped(block):
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)


def pool_in_downsample(block):
    block.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))


def downsample_without_norm(block):
    block.downsample = nn.Conv2d(8, 16, 1, 2)


def downsample_in_other_order(block):
    block.downsample = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1, 2, bias=False))


def downsample_appended(block):
    block.downsample.append(nn.Tanh())


def dropout_as_identity(block):
    block.relu = nn.Sequential(nn.ReLU(), nn.Tanh())


def parametrized(block):
    torch.nn.utils.parametrizations.weight_norm(block.conv1)


def pruned(block):
    from torch.nn.utils import prune

    prune.random_unstructured(block.conv1, "weight", 0.5)


def own_forward(block):
    forward = block.conv2.forward
    block.conv2.forward = lambda x: 2 * forward(x)


def block_forward(block):
    block.forward = lambda x: type(block).forward(block, x) * 2


def frozen(block):
    block.conv1.weight.requires_grad_(False)
    block.bn2.weight.requires_grad_(False)
    block.downsample[1].bias.requires_grad_(False)


def forward_hook(name):
    def change(block):
        block.get_submodule(name).register_forward_hook(lambda m, args, out: out * 1.5)

    change.__name__ = f"a forward hook on {name}"
    return change


def pre_hook(name):
    def change(block):
        block.get_submodule(name).register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))

    change.__name__ = f"a pre-hook on {name}"
    return change


def backward_hook(name):
    def change(block):
        block.get_submodule(name).register_full_backward_hook(lambda m, gi, go: (gi[0] * 1.5,))

    change.__name__ = f"a backward hook on {name}"
    return change


def backward_pre_hook(name):
    def change(block):
        block.get_submodule(name).register_full_backward_pre_hook(lambda m, go: (go[0] * 1.5,))

    change.__name__ = f"a backward pre-hook on {name}"
    return change


HOOKED = ["conv1", "bn2", "relu", "downsample", "downsample.0", ""]
CHANGES = [
    swap_activation, swap_for_relu6, swap_norm, norm_in_eval, eps_and_momentum, no_momentum, untracked, not_affine,
    stride_pair, stride_int, stride_list, dilation, dilation_int, padding_mode, padding_same, with_bias, grouped,
    pool_in_downsample, downsample_without_norm, downsample_in_other_order, downsample_appended, dropout_as_identity,
    parametrized, pruned, own_forward, frozen,
    *(forward_hook(name) for name in HOOKED), *(pre_hook(name) for name in HOOKED),
    backward_hook("conv2"), backward_hook("downsample.0"), backward_pre_hook("conv2"),
]  # fmt: skip


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    x = x.clone().requires_grad_()
    (z,) = outputs_of(model(x))
    z.backward(torch.cos(torch.arange(z.numel(), dtype=z.dtype)).view(z.shape))
    return {"z": z, "x": x.grad} | {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_after_fuse_is_honoured(change, training):
    torch.manual_seed(0)
    stock = make(Basic, 8, 16, 2).double().train(training)
    fused = fused_resnet.fuse(copy.deepcopy(stock))
    assert isinstance(fused, FusedModule)
    for model in (stock, fused):
        torch.manual_seed(3)
        change(model.float())
        model.double()
    x = images(2, 8, 6, 6).double()
    torch.testing.assert_close(step(fused, x), step(stock, x))
    torch.testing.assert_close(step(fused, x), step(stock, x))  # once more: gradients and statistics accumulate


def test_a_function_swapped_in_an_attribute_is_honoured():
    model = fused_resnet.fuse(make(Lambda))
    model.activation = F.gelu
    torch.testing.assert_close(model.eval()(images()), make(Lambda, F.gelu).eval()(images()))


def test_a_downsample_added_or_removed_is_honoured():
    plain, projected = make(Basic), make(Basic, 8, 8)
    projected.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    for source, target in ((plain, projected), (projected, plain)):
        fused, expected = fused_resnet.fuse(copy.deepcopy(source)), copy.deepcopy(source)
        for model in (fused, expected):
            model.downsample = copy.deepcopy(target.downsample)
        torch.testing.assert_close(fused.eval()(images()), expected.eval()(images()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("convert_first", [True, False], ids=["before fuse", "after fuse"])
def test_sync_batchnorm_of_one_process_is_batch_norm(convert_first, training, chains_run):
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    model = make(Basic)
    model = fused_resnet.fuse(convert(model)) if convert_first else convert(fused_resnet.fuse(model))
    assert isinstance(model.bn1, nn.SyncBatchNorm)
    expected = make(Basic).train(training)
    torch.testing.assert_close(model.train(training)(images()), expected(images()))
    torch.testing.assert_close(model.bn1.running_var, expected.bn1.running_var)
    assert len(chains_run) == 1
    assert "synchronized" not in str(fused_resnet.explain(model))


def test_a_global_hook_sees_every_module():
    model, seen = fused_resnet.fuse(make(Basic)), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        model(images())
    finally:
        handle.remove()
    assert model.conv1 in seen


@pytest.mark.parametrize("end", [3, 4, 7])
def test_a_slice_of_a_fused_sequential_is_stocks_slice(end):
    stock = make(nn.Sequential, *InSequential(), *InSequential(), nn.MaxPool2d(2)).eval()
    fused = fused_resnet.fuse(copy.deepcopy(stock))
    torch.testing.assert_close(fused[:end](images()), stock[:end](images()))
    torch.testing.assert_close(fused.append(nn.Tanh())(images()), copy.deepcopy(stock).append(nn.Tanh())(images()))


# ---- shortcuts without parameters ------------------------------------------------------------------------------------

WHOLE = "conv1 bn1 relu conv2 bn2 + pad(x[:, :, ::2, ::2], 4, 4) relu"
PADDED = "conv1 bn1 relu conv2 bn2 + pad(x[:, :, ::1, ::1], 4, 4) relu"  # of what stock makes
STOCK = "conv1 bn1 relu conv2 bn2 + x relu"
# what a block adds, 8 channels of 6x6 made 16 of 3x3, and what is fused of it
SHORTCUTS = {
    "positional": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0), WHOLE),
    "keywords": (lambda x: F.pad(x[:, :, ::2, ::2], pad=[0, 0, 0, 0, 4, 4], mode="constant", value=0.0), WHOLE),
    "no value": (lambda x: F.pad(x[..., ::2, ::2], (0, 0, 0, 0, 4, 4), value=None), WHOLE),
    "begins at 0": (lambda x: F.pad(x[:, :, 0::2, 0::2], (0, 0, 0, 0, 4, 4)), PADDED),
    "an offset": (lambda x: F.pad(x[:, :, 1::2, ::2], (0, 0, 0, 0, 4, 4)), PADDED),
    "an end": (lambda x: F.pad(x[:, :, :5:2, ::2], (0, 0, 0, 0, 4, 4)), PADDED),
    "every other channel": (lambda x: F.pad(x[:, ::2, ::2, ::2], (0, 0, 0, 0, 4, 8)), PADDED.replace("4, 4", "4, 8")),
    "pooled": (lambda x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 4, 4)), PADDED),
    "not zeros": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), value=1.5), STOCK),
    "space": (lambda x: F.pad(x[:, :, :4:2, :4:2], (1, 0, 0, 1, 4, 4)), STOCK),
    "cropped": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 10, -2)), STOCK),
    "replicated": (lambda x: F.pad(x.repeat(1, 2, 1, 1)[:, :, ::4, ::4], (0, 1, 0, 1), "replicate"), STOCK),
    "the batch": (lambda x: F.pad(x[:-1, :, ::2, ::2], (0, 0, 0, 0, 4, 4, 0, 1)), STOCK),
    "concatenated": (lambda x: torch.cat([x[:, :, ::2, ::2]] * 2, 1), STOCK),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_what_is_fused_of_a_shortcut_without_parameters(name, chains_run):
    function, what = SHORTCUTS[name]

    class InTheBlock(FunctionShortcut):
        def forward(self, x):
            out = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(out)) + function(x))

    x = images()
    for cls in (FunctionShortcut, InTheBlock):
        fused = assert_fused_is_as_accurate_as_stock(make(cls, function), x, images(seed=3), images(seed=4))
        (row,) = fused_resnet.explain(fused).fused
        in_a_layer = cls is FunctionShortcut and what != WHOLE  # which the block's own trace does not go into
        assert row.what == (STOCK if in_a_layer else what)
    assert len(chains_run) == 6


def test_zeros_that_another_reads_too_stay_stock():
    class Shared(OptionA):
        def forward(self, x):
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
            return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut), shortcut

    fused = assert_fused_is_as_accurate_as_stock(make(Shared), images())
    assert fused_resnet.explain(fused).fused[0].what == STOCK


def test_a_shortcut_changed_in_place_before_the_sum_is_honoured():
    class Changed(OptionA):
        def forward(self, x):
            source = x * 1
            shortcut = F.pad(source[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            source += 1
            return F.relu(out + shortcut) + source.mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToFuse)
        assert_fused_is_as_accurate_as_stock(make(Changed), images())


def other_function(block):
    block.downsample.function = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 8))


def other_padding(block):
    block.downsample.channels = 4
    block.downsample = nn.Sequential(block.downsample, models.ZeroPadded(4))


def other_stride(block):
    block.downsample.stride = 1
    block.conv1.stride = (1, 1)


def projection_instead(block):
    block.downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))


def doubled_forward(block):
    forward = block.downsample.forward
    block.downsample.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_function, "downsample.function has changed since it was fused"),
        (other_padding, "downsample is a Sequential, was a ZeroPadded when it was fused"),
        (other_stride, "downsample.stride has changed since it was fused"),
        (projection_instead, "downsample is a Sequential, was a ZeroPadded when it was fused"),
        (doubled_forward, "downsample has a forward of its own"),
        (forward_hook("downsample"), "downsample has a hook"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_change_of_a_shortcut_without_parameters_is_honoured(change, reason):
    def build():
        if change is other_function:
            return make(FunctionShortcut).double()
        return make(models.BasicBlock, 8, 16, 2, models.ZeroPadded(8, 2)).double()

    stock, fused = build(), fused_resnet.fuse(build())
    assert isinstance(fused, FusedModule)
    for model in (stock, fused):
        torch.manual_seed(3)
        change(model)
        model.double()
    torch.testing.assert_close(step(fused, images().double()), step(stock, images().double()))
    assert reason in str(fused_resnet.explain(fused))


def test_a_network_of_option_a_is_fused_whole():
    model = fused_resnet.fuse(models.create("resnet20", shortcut="A"))
    report = fused_resnet.explain(model)
    assert len(report.fused) == 1 + 9
    assert not report.left
    padded = {row.module: row.what for row in report.fused if "pad(" in row.what}
    assert padded == {
        f"layer{i}.0": f"conv1 bn1 relu conv2 bn2 + pad(x[:, :, ::2, ::2], 0, {channels}) relu"
        for i, channels in ((2, 16), (3, 32))
    }
    assert list(model.state_dict()) == list(models.create("resnet20", shortcut="A").state_dict())


@pytest.mark.parametrize("cls", [OptionA, OptionAOfAnother, FunctionShortcut])
def test_compiled_a_shortcut_without_parameters_is_as_accurate_as_stock(cls, chains_run):
    torch.compiler.reset()
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    assert_fused_is_as_accurate_as_stock(make(cls), *(images(seed=seed) for seed in range(3)), compile=compiled)


# ---- calls that are stock's ------------------------------------------------------------------------------------------


def test_stocks_error_comes_for_another_dtype(chains_run):
    stock, fused = make(Basic), fused_resnet.fuse(make(Basic))
    for x in (images().double(), images().bfloat16()):
        with pytest.raises(RuntimeError) as expected:
            stock(x)
        with pytest.raises(RuntimeError) as got:
            fused(x)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("shape", [(2, 5, 6, 6), (8, 6), (2, 8, 6), (1, 2, 8, 6, 6)], ids=str)
def test_stocks_error_comes_for_another_shape(shape):
    stock, fused = make(Basic), fused_resnet.fuse(make(Basic))
    with pytest.raises((RuntimeError, ValueError)) as expected:
        stock(images(*shape))
    with pytest.raises(type(expected.value)) as got:
        fused(images(*shape))
    assert str(got.value) == str(expected.value)


def test_stocks_error_comes_for_one_value_per_channel():
    model = nn.Sequential(*InSequential())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused_resnet.fuse(model)(images(1, 8, 1, 1))


def test_a_norm_of_another_width_is_an_error():
    for width in (1, 4):
        model = fused_resnet.fuse(make(Basic), engine="reference")
        model.bn1 = nn.BatchNorm2d(width)
        with pytest.raises((RuntimeError, ValueError)):
            model(images())


def test_an_empty_batch_is_stocks():
    fused = fused_resnet.fuse(make(Basic)).eval()
    assert fused(images()[:0]).shape == (0, 8, 6, 6)


def test_a_keyword_argument_is_stocks():
    torch.testing.assert_close(fused_resnet.fuse(make(Basic)).eval()(x=images()), make(Basic).eval()(images()))


def test_meta_tensors_give_shapes():
    model = fused_resnet.fuse(make(Basic, 8, 16, 2)).to("meta")
    assert model(images().to("meta")).shape == (2, 16, 3, 3)
    with torch.device("meta"):
        model = fused_resnet.fuse(Basic(8, 16, 2))
        assert model(torch.empty(2, 8, 6, 6)).shape == (2, 16, 3, 3)


def test_functional_call_uses_the_parameters_that_it_is_given():
    stock, fused = make(Basic).eval(), fused_resnet.fuse(make(Basic)).eval()
    state = {name: t.detach() * 0.5 for name, t in stock.state_dict().items() if t.is_floating_point()}
    expected = torch.func.functional_call(stock, state, (images(),))
    torch.testing.assert_close(torch.func.functional_call(fused, state, (images(),)), expected)
    assert not torch.equal(fused(images()), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_function_transforms_go_through_stock():
    stock, fused = make(Basic).eval(), fused_resnet.fuse(make(Basic)).eval()
    x = images()

    def loss(model):
        return lambda x: model(x).square().sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(loss(fused))(x), transform(loss(stock))(x))
    torch.testing.assert_close(
        torch.func.jvp(loss(fused), (x,), (torch.ones_like(x),)),
        torch.func.jvp(loss(stock), (x,), (torch.ones_like(x),)),
    )
    batched = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(fused)(batched), torch.func.vmap(stock)(batched))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_goes_through_stock():
    import torch.autograd.forward_ad as forward_ad

    stock, fused = make(Basic).eval(), fused_resnet.fuse(make(Basic)).eval()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(images(), torch.ones(2, 8, 6, 6))
        tangents = [forward_ad.unpack_dual(model(x)).tangent for model in (fused, stock)]
    torch.testing.assert_close(*tangents)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_it_is_plain_aten():
    fused = fused_resnet.fuse(make(Basic)).eval()
    traced = torch.jit.trace(fused, images())
    assert "fused_resnet" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images()), fused(images()))


def test_fx_traces_the_stock_forward():
    fused = fused_resnet.fuse(make(Basic)).eval()
    graph = torch.fx.symbolic_trace(fused)
    assert "bn1" in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(images()), fused(images()))


# ---- copies, files, references ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_file], ids=lambda f: f.__name__)
def test_a_copy_is_fused_too_and_independent(duplicate, chains_run):
    padded = models.BasicBlock(16, 24, 1, models.ZeroPadded(8))
    model = fused_resnet.fuse(make(nn.Sequential, Basic(), Basic(8, 16, 2), padded))
    twin = duplicate(model)
    assert torch.equal(twin(images()), model(images()))
    assert len(chains_run) == 6
    assert not {id(t) for t in twin.state_dict(keep_vars=True).values()} & {
        id(t) for t in model.state_dict(keep_vars=True).values()
    }
    fused_resnet.unfuse(twin)
    assert isinstance(model[0], FusedModule)
    assert type(twin[0]) is Basic


def test_a_model_remains_what_others_hold_of_it():
    model = make(nn.Sequential, Basic(), Basic(8, 16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, parameters = list(model.modules()), list(model.parameters())
    keys = list(model.state_dict())
    fused = fused_resnet.fuse(model)
    assert fused is model
    assert all(a is b for a, b in zip(modules, fused.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, fused.parameters(), strict=True))
    assert list(fused.state_dict()) == keys
    assert isinstance(fused[0], Basic)
    before = fused[0].conv1.weight.detach().clone()
    fused(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(fused[0].conv1.weight, before)


def test_state_dicts_go_both_ways():
    stock, fused = make(Basic), fused_resnet.fuse(make(Basic))
    nn.init.normal_(stock.conv1.weight)
    fused.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(fused.state_dict(), strict=True)
    assert torch.equal(fused.conv1.weight, stock.conv1.weight)


def test_averaged_models_work(chains_run):
    averaged = torch.optim.swa_utils.AveragedModel(fused_resnet.fuse(make(Basic)))
    averaged.update_parameters(make(Basic))
    torch.optim.swa_utils.update_bn([images()], averaged)
    assert len(chains_run) == 1


def test_fuse_twice_is_fuse_once():
    once, twice = fused_resnet.fuse(make(Basic)), fused_resnet.fuse(fused_resnet.fuse(make(Basic)))
    assert type(once) is type(twice)
    assert str(fused_resnet.explain(once)) == str(fused_resnet.explain(twice))
    assert type(fused_resnet.unfuse(twice)) is Basic


AUTOCAST = [Basic, Functional, LinearEnd, PreActivation, WithoutConvolution, Broadcast, OptionA, OptionAOfAnother]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", AUTOCAST)
def test_autocast_gives_stocks_dtype(cls, x_dtype):
    model = make(cls)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingToFuse)
            expected = copy.deepcopy(model).train(training)(images().to(x_dtype)).dtype
            fused = fused_resnet.fuse(copy.deepcopy(model)).train(training)
            assert fused(images().to(x_dtype)).dtype == expected


def test_unfuse_of_a_stock_model_does_nothing():
    model = make(Basic)
    assert type(fused_resnet.unfuse(model)) is Basic


def test_fuse_finds_what_was_new_since_the_last_time(chains_run):
    model = nn.Sequential(fused_resnet.fuse(make(Basic)))
    model.append(make(Basic))
    fused_resnet.fuse(model)(images())
    assert len(chains_run) == 2


# ---- options and refusals --------------------------------------------------------------------------------------------


def test_nothing_to_fuse_warns_with_the_reasons():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU())
    with pytest.warns(NothingToFuse, match=r"nothing to fuse in Sequential.\n(?s:.*)GroupNorm, not a BatchNorm2d"):
        assert fused_resnet.fuse(model) is model
    with pytest.raises(ValueError, match="nothing to fuse in Sequential"):
        fused_resnet.fuse(model, strict=True)


def test_strict_is_silent_where_something_is_fused():
    assert isinstance(fused_resnet.fuse(make(Basic), strict=True), FusedModule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "slow"}, r"memory must be 'fast' or 'lean' \(keeps less for backward\), got 'slow'"),
        ({"chain": "network"}, "chain must be 'auto', 'block' or 'stage'.*got 'network'"),
        ({"engine": "quantum"}, "engine must be one of .*got 'quantum'"),
    ],
)
def test_an_unknown_option_is_refused_and_changes_nothing(options, message):
    model = make(Basic)
    with pytest.raises(ValueError, match=message):
        fused_resnet.fuse(model, **options)
    assert type(model) is Basic


def test_an_engine_that_cannot_serve_the_model_is_refused_and_changes_nothing():
    model = make(Basic).half()
    with pytest.raises(fused_resnet.surgery.engines.EngineError, match=r"engine='cpu' cannot serve: .*float16"):
        fused_resnet.fuse(model, engine="cpu")
    assert type(model) is Basic


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(kind: str) -> nn.Module:
    model = make(Basic)
    if kind == "DistributedDataParallel":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "DataParallel":
        return nn.DataParallel(model)
    return torch.compile(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["DistributedDataParallel", "DataParallel", "OptimizedModule"])
def test_a_wrapped_model_is_refused_with_the_right_order(kind, process_group):
    with pytest.raises(TypeError, match=rf"wrapped in {kind} already; fuse first, then wrap: .*DDP.*torch.compile"):
        fused_resnet.fuse(wrapped(kind))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(TypeError, match="ScriptModule; fuse the model it was made from"):
        fused_resnet.fuse(torch.jit.script(make(Basic)))


@pytest.mark.parametrize("function", [fused_resnet.fuse, fused_resnet.explain])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        function(make)


def test_ddp_trains_a_fused_model(process_group, chains_run):
    stock = make(Basic).double()
    fused = nn.parallel.DistributedDataParallel(fused_resnet.fuse(make(Basic).double()))
    for model in (stock, fused):
        model(images().double()).square().sum().backward()
    assert len(chains_run) == 1
    for a, b in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- explain ---------------------------------------------------------------------------------------------------------


def test_explain_names_what_is_fused_by_which_engine():
    report = fused_resnet.explain(fused_resnet.fuse(make(nn.Sequential, Basic(), Basic(8, 16, 2)), engine="reference"))
    assert [row.module for row in report.fused] == ["0", "1"]
    assert {row.engine for row in report.fused} == {"reference"}
    assert report.fused[0].what == "conv1 bn1 relu conv2 bn2 + x relu"
    assert report.fused[1].what == "conv1 bn1 relu conv2 bn2 + (downsample.0 downsample.1) relu"
    assert str(report).startswith("2 chains fused, 0 places left stock\n")


def test_explain_before_fuse_says_what_could_be():
    report = fused_resnet.explain(make(Basic))
    assert not report.fused
    assert "conv1 bn1 relu conv2 bn2 + x relu can be" in report.left[0].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_activation, "relu is a GELU, not a ReLU"),
        (swap_norm, "bn1 is a GroupNorm, not a BatchNorm2d"),
        (forward_hook("conv1"), "conv1 has a hook"),
        (forward_hook("downsample"), "downsample has a hook"),
        (own_forward, "conv2 has a forward of its own"),
        (padding_mode, "conv2 has .*padding_mode='reflect'"),
        (parametrized, "conv1 is a ParametrizedConv2d, not a Conv2d"),
        (downsample_appended, "downsample has other children than when it was fused"),
        (downsample_without_norm, "downsample is a Conv2d, was a Sequential when it was fused"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_explain_names_what_a_change_costs(change, reason):
    model = fused_resnet.fuse(make(Basic, 8, 16, 2))
    change(model)
    report = fused_resnet.explain(model)
    assert not report.fused
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(str(report))
