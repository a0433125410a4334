"""Changes after fuse are honoured, and explain names what they cost."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.blocks.mixin import FusedModule
from tests.support.accuracy import record
from tests.support.changes import double_forward
from tests.support.hand_written import Basic, FunctionShortcut, InSequential, Lambda, images, make


def swap_activation(block):
    block.relu = nn.Tanh()


def swap_for_relu6(block):
    block.relu = nn.ReLU6()


def swap_norm(block):
    block.bn1 = nn.GroupNorm(2, 16)


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
    double_forward(block.conv2)


def frozen(block):
    block.conv1.weight.requires_grad_(False)
    block.bn2.weight.requires_grad_(False)
    block.downsample[1].bias.requires_grad_(False)


HOOKS = {
    "forward hook": ("register_forward_hook", lambda m, args, out: out * 1.5),
    "pre-hook": ("register_forward_pre_hook", lambda m, args: (args[0] * 1.5,)),
    "backward hook": ("register_full_backward_hook", lambda m, gi, go: (gi[0] * 1.5,)),
    "backward pre-hook": ("register_full_backward_pre_hook", lambda m, go: (go[0] * 1.5,)),
}


def hook(kind, name):
    def change(block):
        register, function = HOOKS[kind]
        getattr(block.get_submodule(name), register)(function)

    change.__name__ = f"a {kind} on {name}"
    return change


HOOKED = ["conv1", "bn2", "relu", "downsample", "downsample.0", ""]
CHANGES = [
    swap_activation, swap_for_relu6, swap_norm, norm_in_eval, eps_and_momentum, no_momentum, untracked, not_affine,
    stride_pair, stride_int, stride_list, dilation, dilation_int, padding_mode, padding_same, with_bias, grouped,
    pool_in_downsample, downsample_without_norm, downsample_in_other_order, downsample_appended, dropout_as_identity,
    parametrized, pruned, own_forward, frozen,
    *(hook(kind, name) for kind in ("forward hook", "pre-hook") for name in HOOKED),
    hook("backward hook", "conv2"), hook("backward hook", "downsample.0"), hook("backward pre-hook", "conv2"),
]  # fmt: skip


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
    torch.testing.assert_close(record(fused, x), record(stock, x))
    torch.testing.assert_close(record(fused, x), record(stock, x))  # once more: gradients and statistics accumulate


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


# ---- of shortcuts without parameters ---------------------------------------------------------------------------------


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
    double_forward(block.downsample)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_function, "downsample.function has changed since it was fused"),
        (other_padding, "downsample is a Sequential, was a ZeroPadded when it was fused"),
        (other_stride, "downsample.stride has changed since it was fused"),
        (projection_instead, "downsample is a Sequential, was a ZeroPadded when it was fused"),
        (doubled_forward, "downsample has a forward of its own"),
        (hook("forward hook", "downsample"), "downsample has a hook"),
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
    torch.testing.assert_close(record(fused, images().double()), record(stock, images().double()))
    assert reason in str(fused_resnet.explain(fused))


# ---- what they cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_activation, "relu is a Tanh, not one of ReLU, ReLU6, "),
        (swap_norm, "bn1 is a GroupNorm, not a BatchNorm2d"),
        (hook("forward hook", "conv1"), "conv1 has a hook"),
        (hook("forward hook", "downsample"), "downsample has a hook"),
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
