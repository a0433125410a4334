"""The plain networks against torchvision's and against the paper."""

import pytest
import torch

import fused_resnet
from fused_resnet import models

IMAGENET = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
CIFAR = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet1202"]
PLAIN = ["plain18", "plain34", "plain20", "plain32", "plain44", "plain56", "plain110"]

# table 6 of the paper, in millions, with option A's shortcuts, which have no parameters
PAPER_PARAMETERS = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "resnet110": 1.7,
    "resnet1202": 19.4,
}
# what option B adds: two 1x1 projections with their batch norms
PROJECTIONS = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
VGG = ["vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_model_is_registered_under_its_name():
    assert sorted(models.names()) == sorted(IMAGENET + CIFAR + PLAIN + VGG)


def test_an_unknown_name_is_answered_with_those_that_exist():
    with pytest.raises(
        ValueError,
        match=r"model must be one of resnet18, .*plain110, or torchvision:NAME or timm:NAME; got 'resnet19'",
    ):
        models.create("resnet19")


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


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_parameter_counts_are_the_papers_plus_the_projections(name):
    paper = PAPER_PARAMETERS[name]
    digits = len(str(paper).split(".")[1])
    with torch.device("meta"):
        counted = (parameters(models.create(name)) - PROJECTIONS) / 1e6
    # the paper cuts off (0.467 becomes 0.46) where it does not round
    assert 0 <= counted - paper + 0.5 * 10**-digits < 1.5 * 10**-digits


@pytest.mark.parametrize("name", CIFAR)
def test_option_a_has_the_papers_parameters_alone(name):
    with torch.device("meta"):
        model, default = models.create(name, shortcut="A"), models.create(name)
    assert parameters(model) == parameters(default) - PROJECTIONS
    assert list(model.state_dict()) == [key for key in default.state_dict() if "downsample" not in key]


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


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_twin_is_the_same_layers_without_shortcuts(name):
    with torch.device("meta"):
        plain = models.create(name)
        residual = models.create(name.replace("plain", "resnet"), shortcut="A")
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (plain, residual)]
    assert shapes[0] == shapes[1]
    assert all(not block.residual and block.downsample is None for block in plain.layer1)


def test_a_plain_block_adds_nothing():
    block = models.create("plain20").layer1[0]
    torch.nn.init.zeros_(block.last_norm.weight)
    assert not block(torch.rand(2, 16, 8, 8)).any()


def test_every_stage_of_a_plain_network_is_one_chain():
    report = fused_resnet.explain(fused_resnet.fuse(models.create("plain20")))
    assert [row.module for row in report.fused] == ["(FusedResNet)", "layer1", "layer2", "layer3"]
    assert not report.left


def test_a_plain_block_cannot_begin_as_its_shortcut():
    with pytest.raises(ValueError, match="zero_init_residual needs shortcuts, got shortcut='none'"):
        models.create("plain20", zero_init_residual=True)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_depth_is_the_number_of_weighted_layers(name):
    with torch.device("meta"):
        model = models.create(name)
    weighted = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and "downsample" not in module_name
    ]
    assert len(weighted) == int(name.removeprefix("resnet"))


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


def test_stages_without_widths_are_refused():
    with pytest.raises(ValueError, match="got 3 depths and 4 widths"):
        models.ResNet(models.BasicBlock, (2, 2, 2))


def test_a_model_compiles_as_one_graph():
    model = models.create("resnet20").eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))
