"""Errors that the paper and its authors published, to put beside one's own."""

from typing import NamedTuple


class Published(NamedTuple):
    """A published error in percent; `top5` where it was given, `shortcut` where the network is not the default's."""

    data: str
    model: str
    crops: int
    top1: float
    top5: float | None
    shortcut: str | None
    source: str


# the models that the authors gave away, github.com/KaimingHe/deep-residual-networks: one center crop, shorter side 256
RELEASE = "the authors' release"

PUBLISHED = [
    Published("imagenet", "vgg16", 1, 28.5, 9.9, None, RELEASE),
    Published("imagenet", "resnet50", 1, 24.7, 7.8, None, RELEASE),
    Published("imagenet", "resnet101", 1, 23.6, 7.1, None, RELEASE),
    Published("imagenet", "resnet152", 1, 23.0, 6.7, None, RELEASE),
    Published("imagenet", "plain18", 10, 27.94, None, None, "table 2"),
    Published("imagenet", "resnet18", 10, 27.88, None, "A", "table 2"),
    Published("imagenet", "vgg16", 10, 28.07, 9.33, None, "table 3"),
    Published("imagenet", "plain34", 10, 28.54, 10.02, None, "table 3"),
    Published("imagenet", "resnet34", 10, 25.03, 7.76, "A", "table 3"),
    Published("imagenet", "resnet34", 10, 24.52, 7.46, "B", "table 3"),
    Published("imagenet", "resnet34", 10, 24.19, 7.40, "C", "table 3"),
    Published("imagenet", "resnet50", 10, 22.85, 6.71, None, "table 3"),
    Published("imagenet", "resnet101", 10, 21.75, 6.05, None, "table 3"),
    Published("imagenet", "resnet152", 10, 21.43, 5.71, None, "table 3"),
    Published("cifar10", "resnet20", 1, 8.75, None, "A", "table 6"),
    Published("cifar10", "resnet32", 1, 7.51, None, "A", "table 6"),
    Published("cifar10", "resnet44", 1, 7.17, None, "A", "table 6"),
    Published("cifar10", "resnet56", 1, 6.97, None, "A", "table 6"),
    Published("cifar10", "resnet110", 1, 6.43, None, "A", "table 6"),
    Published("cifar10", "resnet1202", 1, 7.93, None, "A", "table 6"),
]


def published(data: str, model: str, crops: int) -> list[Published]:
    """Return what was published for a network, whoever's package it comes from, tested in this way."""
    name = model.rpartition(":")[2]
    return [row for row in PUBLISHED if (row.data, row.model, row.crops) == (data, name, crops)]
