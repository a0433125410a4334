"""The paper's experiments, and the recipe that each has by default."""

from collections.abc import Sequence
from typing import Any

from fused_resnet import models
from fused_resnet.experiments.experiment import Experiment, Network, Panel
from fused_resnet.training import Recipe, recipes
from fused_resnet.training.recipe import require

# the paper's recipe for CIFAR-10 in little: a seventieth of its steps, hence a lower rate than the 0.1 at which deep
# networks are slow to start, and no augmentation; what else was tried is in docs/experiments.md
DIGITS = {"epochs": 40, "batch_size": 64, "lr": 0.03, "max_shift": 0, "flip": False}


def make_recipe(data: str, depth: int, **changes: Any) -> Recipe:
    """Return the paper's recipe for a data set and the deepest network, whose warm-up all have; with changes."""
    if data.startswith("digits"):
        return recipes.named("cifar", data=data, model=f"resnet{depth}", **{**DIGITS, **changes})
    return recipes.named(data=data, model=f"resnet{depth}", **changes)


def degradation(depths: Sequence[int], data: str, seeds: int, **changes: Any) -> Experiment:
    """Compare plain networks of several depths, and residual ones with parameter-free shortcuts: figures 4 and 6.

    Parameters
    ----------
    depths : sequence of int
        At least two, of networks that exist plain and residual.
    data : str
        A name that `fused_resnet.training.data.load` knows.
    seeds : int
        Runs of each network.
    **changes
        Fields of `Recipe`.

    Raises
    ------
    ValueError
        A value that no run can be made with.
    """
    known = sorted(set(depths_of("plain")) & set(depths_of("resnet")))
    enough = len(set(depths)) >= 2 and set(depths) <= set(known)
    require("depths", [*depths], enough, f"two or more of {', '.join(map(str, known))}")
    ordered = sorted(set(depths))
    plain = [Network(f"plain-{depth}", f"plain{depth}") for depth in ordered]
    residual = [Network(f"ResNet-{depth}", f"resnet{depth}", shortcut="A") for depth in ordered]
    return Experiment(
        name="degradation",
        title=f"Plain and residual networks on {data}",
        panels=[Panel("plain", plain), Panel("residual", residual)],
        recipe=make_recipe(data, ordered[-1], **changes),
        seeds=seeds,
    )


def shortcuts(depth: int, data: str, seeds: int, **changes: Any) -> Experiment:
    """Compare section 3.3's options A, B and C in one residual network, and the network without shortcuts: table 3.

    Parameters and errors are those of `degradation`, with one depth.
    """
    known = depths_of("resnet")
    require("depth", depth, depth in known, f"one of {', '.join(map(str, known))}")
    networks = [Network(shortcut, f"resnet{depth}", shortcut) for shortcut in ("none", "A", "B", "C")]
    return Experiment(
        name="shortcuts",
        title=f"Shortcuts of a {depth}-layer network on {data}",
        panels=[Panel("", networks)],
        recipe=make_recipe(data, depth, **changes),
        seeds=seeds,
    )


def depths_of(family: str) -> list[int]:
    """Return the depths of which `fused_resnet.models` has a network of a family."""
    depths = (name.removeprefix(family) for name in models.names() if name.startswith(family))
    return sorted(int(depth) for depth in depths if depth.isdecimal())
