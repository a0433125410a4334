"""The learning rate over a run."""

import torch
from torch.optim import lr_scheduler

from fused_resnet.training.recipe import Recipe


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> lr_scheduler.LRScheduler:
    """Return the scheduler of a recipe, to be advanced after every one of `steps` steps.

    The first W steps, ``warmup`` of them all, warm up:

    ``one-cycle``
        the rate rises along a cosine for W steps, then falls along one to nearly zero (Smith & Topin 2017,
        arXiv:1708.07120).
    ``steps``
        a tenth of the rate for W steps, then the rate, divided by ten at each milestone (He et al. 2015, section 4.2).
    ``cosine``
        the rate rises linearly for W steps, then falls along a cosine to zero (Loshchilov & Hutter 2017,
        arXiv:1608.03983).
    """
    warmup = round(recipe.warmup_part * steps)
    if recipe.schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(
            optimizer, max_lr=recipe.lr, total_steps=steps, pct_start=recipe.warmup_part, cycle_momentum=False
        )
    if recipe.schedule == "steps":
        low = [lr_scheduler.ConstantLR(optimizer, 0.1, total_iters=warmup)] if warmup else []
        falls = lr_scheduler.MultiStepLR(optimizer, [round(part * steps) for part in recipe.milestones])
        return lr_scheduler.ChainedScheduler([*low, falls])
    if warmup == 0:
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    rise = lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[warmup])
