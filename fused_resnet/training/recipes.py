"""The paper's recipes, by name."""

import dataclasses
from typing import Any

from fused_resnet import models
from fused_resnet.training.recipe import Recipe, require

# the paper's: sections 4.2 and 3.4. It divides ImageNet's learning rate when the error plateaus; the epochs are those
# that its authors' successors agree on (Goyal et al. 2017, arXiv:1706.02677)
PAPER = Recipe(schedule="steps", lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4, flip=True)
RECIPES = {
    "digits": Recipe(),
    "cifar": dataclasses.replace(
        PAPER,
        shortcut="A",  # "in all cases", section 4.2
        data="cifar10",
        epochs=None,
        iterations=64_000,
        milestones=(32_000 / 64_000, 48_000 / 64_000),
        batch_size=128,
        max_shift=4,
    ),
    "imagenet": dataclasses.replace(
        PAPER, model="resnet50", data="imagenet", epochs=90, milestones=(30 / 90, 60 / 90), batch_size=256
    ),
}
RECIPE_OF_DATA = {
    "digits": "digits",
    "digits8x8": "digits",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "imagenet": "imagenet",
    "folder": "imagenet",
    "synthetic": "imagenet",
}

# section 4.2: 0.1 "is slightly too large to start converging" for ResNet-110, which has 0.01 "until the training error
# is below 80% (about 400 iterations)"
WARMED_UP = ("110", "1202")
WARMUP_ITERATIONS = 400


def named(name: str | None = None, **changes: Any) -> Recipe:
    """Return a recipe by its name, with changes.

    Parameters
    ----------
    name : str, optional
        ``digits``, ``cifar`` or ``imagenet``; by default the one that belongs to the data set.
    **changes
        Fields of `Recipe`. One of `epochs` and `iterations` takes the other's place.

    Raises
    ------
    ValueError
        No recipe has that name, or a value is one that no run can be made with.
    """
    if name is None:
        name = RECIPE_OF_DATA.get(changes.get("data", ""), "digits")
    require("recipe", name, name in RECIPES, f"one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if "epochs" in changes:
        changes.setdefault("iterations", None)
    elif "iterations" in changes:
        changes.setdefault("epochs", None)
    if name == "cifar":
        model = changes.get("model", recipe.model)
        if model.endswith(WARMED_UP):
            changes.setdefault("warmup", WARMUP_ITERATIONS / 64_000)
        if model not in models.names() or not model.startswith("resnet"):
            changes.setdefault("shortcut", None)
    return dataclasses.replace(recipe, **changes)
