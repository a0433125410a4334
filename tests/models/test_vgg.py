"""VGG against torchvision's."""

import pytest
import torch

import fused_resnet
from fused_resnet import models
from fused_resnet.surgery import NothingToFuse

NAMES = ["vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_shapes_are_torchvisions(name):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours, theirs = models.create(name), getattr(torchvision.models, name)()
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])


def test_one_seed_gives_torchvisions_network():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    ours = models.vgg16_bn(num_classes=10).eval()
    torch.manual_seed(0)
    theirs = torchvision.models.vgg16_bn(num_classes=10).eval()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))


def test_with_batch_norm_every_layer_before_the_classifier_is_fused():
    with torch.device("meta"):
        features = models.vgg16_bn().features
    report = fused_resnet.explain(fused_resnet.fuse(features.to_empty(device="cpu")))
    assert not report.left
    assert " ".join(row.what for row in report.fused).split() == [name for name, _ in features.named_children()]


def test_without_batch_norm_there_is_nothing_to_fuse():
    with torch.device("meta"):
        features = models.vgg16().features
    with pytest.warns(NothingToFuse):
        fused_resnet.fuse(features.to_empty(device="cpu"))


def test_stages_are_five():
    with pytest.raises(ValueError, match=r"depths must hold one entry for each of 5 stages, got \(2, 2\)"):
        models.VGG((2, 2))
