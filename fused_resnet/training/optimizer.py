"""The optimizer of a run."""

import torch
from torch import nn

from fused_resnet.training.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.SGD:
    """Return SGD with momentum and a weight decay of all parameters, as in the paper."""
    # where the loss scale makes the first step overflow, fused SGD leaves its momentum uninitialized (torch 2.11)
    fused = device.type == "cuda" and recipe.precision != "fp16"
    return torch.optim.SGD(
        model.parameters(),
        # a captured step reads the rate where the scheduler writes it
        lr=torch.tensor(recipe.lr, device=device) if recipe.cuda_graph else recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=fused or None,  # None: as torch chooses
    )
