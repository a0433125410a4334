"""A network of each kind, fused: as accurate as stock, forward and backward."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import models
from tests.support.accuracy import assert_fused_is_as_accurate_as_stock


def as_trained(model: nn.Module, offset: float = 0) -> nn.Module:
    """Give the norms a trained network's parameters and statistics.

    An offset keeps what a ReLU reads away from 0, where a rounding decides whether a gradient passes: in a deep network
    one such element outweighs all other errors.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, offset, std=0.2)
            if path.endswith("bn1"):  # some channels are off; behind an add all are on
                module.bias.data[::4] -= 2 * offset
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def vgg_bn() -> nn.Module:
    """VGG with batch norm, without the hundred million weights of its classifier."""
    with torch.device("meta"):
        model = models.VGG((2, 1, 2, 1, 1), batch_norm=True)
    model.avgpool = model.classifier = nn.Identity()
    model.to_empty(device="cpu")
    for module in model.features:
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()
    return model


def bottlenecks(block: type[models.Bottleneck], **options) -> nn.Module:
    return models.ResNet(block, (1, 2, 2), widths=(16, 16, 32), num_classes=10, **options)


# what makes the network, how many chains it runs, and the offset of its norms: 0 before a 1x1 convolution, whose norm
# has to cancel it, and before a max pool, which chooses by the digits that it takes
KINDS = {
    "plain": (models.plain20, 4, 6),
    "option A": (partial(models.resnet20, shortcut="A"), 10, 6),
    "option B": (partial(models.resnet20, shortcut="B"), 10, 6),
    "option C": (partial(models.resnet20, shortcut="C"), 10, 6),
    "dilated": (partial(models.resnet20, replace_stride_with_dilation=(False, True)), 10, 6),
    "features only": (partial(models.resnet20, features_only=True), 10, 6),
    "v1": (partial(bottlenecks, models.BottleneckV1), 6, 0),
    "dilated bottlenecks": (partial(bottlenecks, models.Bottleneck, replace_stride_with_dilation=(True, True)), 6, 0),
    "vgg_bn": (vgg_bn, 5, 0),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_each_kind_is_as_accurate_as_stock(kind, training, chains_run):
    make, chains, offset = KINDS[kind]
    model = as_trained(make(), offset).train(training)
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    fused = assert_fused_is_as_accurate_as_stock(model, *images)
    assert len(chains_run) == 3 * chains
    assert not fused_resnet.explain(fused).left


def lengthened(shallow: models.ResNet, name: str, shortcut: str) -> models.ResNet:
    """Return a deeper network that begins as a shallow one: the blocks that each stage has more are the identity."""
    deep = models.create(name, shortcut=shortcut)
    weights = {**deep.state_dict(), **shallow.state_dict()}
    deep.load_state_dict(weights)
    for stage in deep.stage_names:
        for block in deep.get_submodule(stage)[len(shallow.get_submodule(stage)) :]:
            nn.init.zeros_(block.last_norm.weight)
            nn.init.zeros_(block.last_norm.bias)
    return deep


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fuse", [fused_resnet.fuse, lambda model: model], ids=["fused", "stock"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_20_layers_and_36_that_are_the_identity_compute_what_20_layers_do(shortcut, fuse, training):
    # section 1: a deeper network need never be worse, for there is this solution by construction
    shallow = as_trained(models.resnet20(shortcut=shortcut))
    deep = lengthened(shallow, "resnet56", shortcut)
    images = torch.randn(4, 3, 32, 32)
    expected = copy.deepcopy(shallow).train(training)(images)
    torch.testing.assert_close(fuse(deep.train(training))(images), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(deep(images), fuse(shallow.train(training))(images))
