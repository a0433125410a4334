"""The residual networks against torchvision's, and each of their options."""

import pytest
import torch

import fused_resnet
from fused_resnet import models

IMAGENET = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@pytest.mark.parametrize("zero_init_residual", [False, True])
@pytest.mark.parametrize("name", IMAGENET)
def test_one_seed_gives_torchvisions_network(name, zero_init_residual):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    ours = models.create(name, num_classes=10, zero_init_residual=zero_init_residual).state_dict()
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10, zero_init_residual=zero_init_residual).state_dict()
    assert list(ours) == list(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_weights_give_torchvisions_output(name, training):
    torchvision = pytest.importorskip("torchvision")
    theirs = getattr(torchvision.models, name)(num_classes=10).train(training)
    ours = models.create(name, num_classes=10).train(training)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_option_a_is_every_other_pixel_and_zeros():
    shortcut = models.create("resnet20", shortcut="A").layer2[0].downsample
    x = torch.randn(2, 16, 5, 7)
    z = shortcut(x)
    assert z.shape == (2, 32, 3, 4)
    assert torch.equal(z[:, :16], torch.nn.functional.max_pool2d(x, 1, 2))
    assert not z[:, 16:].any()


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 9), ("resnet50", 16)])
def test_option_c_projects_in_every_block(name, blocks):
    model = models.create(name, shortcut="C")
    projections = [m for m in model.modules() if getattr(m, "downsample", None) is not None]
    assert len(projections) == blocks
    assert all(type(block.downsample[0]) is torch.nn.Conv2d for block in projections)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.fc.out_features)


def test_an_unknown_shortcut_is_refused():
    with pytest.raises(ValueError, match="shortcut must be one of 'A', 'B', 'C', 'none', got 'D'"):
        models.create("resnet20", shortcut="D")


@pytest.mark.parametrize("depth", [18, 20, 56])
def test_a_plain_twin_is_the_same_layers_without_shortcuts(depth):
    with torch.device("meta"):
        plain, residual = models.create(f"plain{depth}"), models.create(f"resnet{depth}", shortcut="A")
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (plain, residual)]
    assert shapes[0] == shapes[1]
    assert all(not block.residual and block.downsample is None for block in plain.layer1)


def test_a_plain_block_adds_nothing():
    block = models.create("plain20").layer1[0]
    torch.nn.init.zeros_(block.last_norm.weight)
    assert not block(torch.rand(2, 16, 8, 8)).any()


def test_every_stage_of_a_plain_network_is_one_chain():
    report = fused_resnet.explain(fused_resnet.fuse(models.create("plain20")))
    assert [row.module for row in report.fused] == ["(ResNet)", "layer1", "layer2", "layer3"]
    assert not report.left


def test_a_plain_block_cannot_begin_as_its_shortcut():
    with pytest.raises(ValueError, match="zero_init_residual needs shortcuts, got shortcut='none'"):
        models.create("plain20", zero_init_residual=True)


def test_cifar_stages_halve_the_image_and_double_the_channels():
    model = models.create("resnet20", in_channels=1)
    shapes = []
    for name in ("layer1", "layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    logits = model(torch.randn(2, 1, 32, 32))
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert logits.shape == (2, 10)


def test_zero_init_residual_begins_every_block_as_its_shortcut():
    block = models.create("resnet20", zero_init_residual=True).layer1[0]
    x = torch.rand(2, 16, 8, 8)  # not negative, so that the last relu changes nothing
    assert torch.equal(block(x), x)


def test_the_papers_bottleneck_strides_in_its_first_1x1():
    block = models.create("resnet50", stride_in_1x1=True).layer2[0]
    assert [block.conv1.stride, block.conv2.stride, block.conv3.stride] == [(2, 2), (1, 1), (1, 1)]
    block = models.create("resnet50").layer2[0]
    assert [block.conv1.stride, block.conv2.stride, block.conv3.stride] == [(1, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize("dilated", [(False, False, True), (False, True, True), (True, False, True)])
def test_a_dilated_network_is_torchvisions(dilated):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=10, replace_stride_with_dilation=dilated)
    torch.manual_seed(0)
    ours = models.resnet50(num_classes=10, replace_stride_with_dilation=dilated)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_dilated_stages_keep_the_size_of_the_image():
    model = models.create("resnet20", replace_stride_with_dilation=(False, True), features_only=True)
    shapes = {name: tuple(feature.shape) for name, feature in model(torch.randn(2, 3, 32, 32)).items()}
    assert shapes == {"layer1": (2, 16, 32, 32), "layer2": (2, 32, 16, 16), "layer3": (2, 64, 16, 16)}
    dilations = [(block.conv1.dilation, block.conv2.dilation) for block in model.layer3]
    assert dilations == [((1, 1), (1, 1)), ((2, 2), (2, 2)), ((2, 2), (2, 2))]


def test_dilation_is_told_for_every_stage_but_the_first():
    with pytest.raises(ValueError, match=r"one entry for each stage but the first, 2 in all, got \(True,\)"):
        models.create("resnet20", replace_stride_with_dilation=(True,))


def test_frozen_norms_are_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    frozen = torchvision.ops.FrozenBatchNorm2d
    theirs = torchvision.models.resnet18(num_classes=10, norm_layer=frozen)
    ours = models.resnet18(num_classes=10, norm_layer=frozen)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_features_are_the_outputs_of_the_stages():
    features_only = models.create("resnet20", features_only=True)
    whole = models.create("resnet20")
    features_only.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("fc.")})
    images = torch.randn(2, 3, 32, 32)
    features = features_only(images)
    assert list(features) == ["layer1", "layer2", "layer3"]
    assert torch.equal(whole.fc(whole.avgpool(features["layer3"]).flatten(1)), whole(images))


# variances of a 3x3 convolution of 32 channels to 64
VARIANCES = {"he_fan_out": 2 / (9 * 64), "he_fan_in": 2 / (9 * 32), "xavier": 2 / (9 * (32 + 64))}


@pytest.mark.parametrize("init", VARIANCES)
def test_convolutions_are_drawn_with_the_variance_of_their_initialisation(init):
    weight = models.create("resnet20", init=init).layer3[0].conv1.weight
    assert weight.var().item() == pytest.approx(VARIANCES[init], rel=0.05)


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ValueError, match="init must be one of 'he_fan_out', 'he_fan_in', 'xavier', got 'he'"):
        models.create("resnet20", init="he")


def test_stages_without_widths_are_refused():
    with pytest.raises(ValueError, match="got 3 depths and 4 widths"):
        models.ResNet(models.BasicBlock, (2, 2, 2))


def test_a_model_compiles_as_one_graph():
    model = models.create("resnet20").eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))
