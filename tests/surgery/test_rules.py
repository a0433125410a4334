"""What is found in blocks as people write them: how many chains run, as accurate as stock; unfuse gives all back."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.surgery import NothingToFuse
from tests.support.accuracy import assert_fused_is_as_accurate_as_stock, outputs_of
from tests.support.hand_written import (
    Basic,
    BranchOnShape,
    BranchOnType,
    Broadcast,
    ChangesItsInput,
    ConvTwice,
    Functional,
    FunctionShortcut,
    InfiniteBound,
    InnerOutput,
    InPlaceBefore,
    InSequential,
    Lambda,
    LinearEnd,
    LocalFunction,
    Method,
    Nested,
    NormTwice,
    OptionA,
    OptionAOfAnother,
    PreActivation,
    PreActivationInPlace,
    RawOutput,
    Scaled,
    SqueezeExcite,
    Stem,
    TensorConstant,
    WithoutConvolution,
    images,
    make,
)

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
