"""The registry's networks, and their counts against the paper's."""

import functools
from pathlib import Path

import pytest
import torch

from fused_resnet import models

IMAGENET = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "plain18", "plain34"]
CIFAR = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet1202"]
PLAIN_CIFAR = ["plain20", "plain32", "plain44", "plain56", "plain110"]
VGG = ["vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]

# table 6, in millions of parameters
TABLE_6 = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7, "resnet1202": 19.4}

# table 1 and figure 3, in billions of multiply-adds; the paper strides in a bottleneck's first 1x1
V1 = {"stride_in_1x1": True}
MULTIPLY_ADDS = [
    ("resnet18", {}, 1.8),
    ("plain18", {}, 1.8),
    ("resnet34", {"shortcut": "A"}, 3.6),
    ("plain34", {}, 3.6),
    ("resnet50", V1, 3.8),
    ("resnet101", V1, 7.6),
    ("resnet152", V1, 11.3),
    ("vgg19", {}, 19.6),
]


summarize = functools.cache(models.summarize)


def meets(counted: float, paper: float) -> bool:
    """Whether a count is the paper's, which rounds some of its figures and cuts others off (0.467 becomes 0.46)."""
    digit = 10.0 ** -len(str(paper).partition(".")[2])
    return -digit / 2 <= counted - paper < digit


def test_every_network_is_registered_under_its_name():
    assert sorted(models.names()) == sorted(IMAGENET + CIFAR + PLAIN_CIFAR + VGG)
    assert all(getattr(models, name).__name__ == name for name in models.names())


def test_an_unknown_name_is_answered_with_those_that_exist():
    with pytest.raises(
        ValueError,
        match=r"model must be one of resnet18, .*plain110, or torchvision:NAME or timm:NAME; got 'resnet19'",
    ):
        models.create("resnet19")


@pytest.mark.parametrize("name", models.names())
def test_every_network_has_the_depth_in_its_name_and_is_counted(name):
    summary = summarize(name)
    assert summary.depth == int("".join(filter(str.isdigit, name)))
    assert summary.image_size == (32 if name in CIFAR + PLAIN_CIFAR else 224)
    assert summary.shortcut == ("B" if name.startswith("resnet") else "none")


@pytest.mark.parametrize(("name", "classes"), [("resnet18", 1000), ("vgg16", 1000), ("resnet20", 10), ("plain20", 10)])
def test_parameters_are_all_of_the_models(name, classes):
    with torch.device("meta"):
        model = models.create(name)
        logits = model(torch.empty(2, 3, 32, 32))
    assert logits.shape == (2, classes)
    assert models.summarize(name).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TABLE_6)
def test_parameters_are_those_of_table_6(name):
    assert meets(models.summarize(name, shortcut="A").parameters / 1e6, TABLE_6[name])


def test_option_a_saves_the_projections_alone():
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    identity, projected = (models.summarize("resnet20", shortcut=option) for option in "AB")
    assert projected.parameters - identity.parameters == projections


@pytest.mark.parametrize(("name", "options", "paper"), MULTIPLY_ADDS)
def test_multiply_adds_are_the_papers(name, options, paper):
    assert meets(models.summarize(name, **options).multiply_adds / 1e9, paper)


def test_multiply_adds_are_half_of_torchs_flop():
    flop_counter = torch.utils.flop_counter.FlopCounterMode(display=False)
    with torch.device("meta"), flop_counter:
        models.create("resnet20", shortcut="C", in_channels=1)(torch.empty(1, 1, 32, 32))
    assert 2 * models.summarize("resnet20", shortcut="C", in_channels=1).multiply_adds == flop_counter.get_total_flops()


def test_the_documented_counts_are_the_networks():
    lines = (Path(__file__).parents[2] / "docs" / "networks.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:6]] for line in lines if line.startswith("| `")]
    documented = {row[0]: row[1:] for row in rows if row[0] in models.names()}
    assert list(documented) == models.names()
    for name in models.names():
        s = summarize(name)
        counts = [f"{s.depth}", f"{s.parameters / 1e6:.2f} M", f"{s.multiply_adds / 1e6:,.0f} M", s.shortcut]
        assert documented[name] == counts, name
