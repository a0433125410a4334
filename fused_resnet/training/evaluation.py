"""The errors of a network on test images."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """What a network does on test images: the mean cross entropy, and top-1 and top-5 error as fractions of them."""

    images: int
    loss: float
    top1: float
    top5: float


@torch.no_grad()
def evaluate(forward: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Compare a network's predictions with the labels.

    Parameters
    ----------
    forward : callable
        Maps images [N, C, H, W] to logits [N, classes]; a model in eval mode.
    batches : iterable of (Tensor, Tensor)
        Views [N, V, C, H, W] of N images, whose probabilities are averaged over the V views (Krizhevsky et al. 2012,
        section 4.1), and labels [N].
    """
    sums, images = [], 0
    for views, labels in batches:
        log_p = log_probabilities(forward, views)
        ranked = log_p.topk(min(5, log_p.shape[1])).indices == labels[:, None]
        right = torch.stack((ranked[:, 0].sum(), ranked.sum()))
        loss = F.nll_loss(log_p, labels, reduction="sum").double()
        sums.append(torch.cat((loss[None], len(labels) - right)))
        images += len(labels)
    mean_loss, top1, top5 = (torch.stack(sums).sum(0) / images).tolist()
    return Evaluation(images, mean_loss, top1, top5)


def log_probabilities(forward: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """Return the logarithm of the softmax [N, classes], averaged over views [N, V, C, H, W]."""
    logits = forward(views.flatten(0, 1)).unflatten(0, views.shape[:2])
    log_p: Tensor = logits.log_softmax(2).logsumexp(1) - math.log(views.shape[1])
    return log_p
