"""Move the running statistics of a chain's batch norms, once a step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_resnet.blocks.checkpointing import is_recomputation
from fused_resnet.blocks.prepare import PreparedChain
from fused_resnet.chain.autograd import update_running_stats_


def update_running_stats(chain: PreparedChain, moments: Sequence[Tensor]) -> None:
    """Move the running statistics of a chain's batch norms in training, as ``torch.nn.BatchNorm2d`` does.

    What activation checkpointing runs again has moved them in its first forward.
    """
    if not torch.compiler.is_compiling() and is_recomputation():
        return
    by_momentum: dict[float | None, tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = {}
    for norm, new in zip(chain.norms, moments, strict=True):
        if norm is None or not norm.training or not norm.track_running_stats:
            continue
        counter = norm.num_batches_tracked
        if norm.running_mean is None:
            if counter is not None:
                counter.add_(1)
            continue
        momentum = 0.0 if norm.momentum is None and counter is None else norm.momentum
        means, variances, counters, batch = by_momentum.setdefault(momentum, ([], [], [], []))
        means.append(norm.running_mean)
        variances.append(norm.running_var)
        batch.append(new)
        if counter is not None:
            counters.append(counter)
    for momentum, tensors in by_momentum.items():
        engine, _ = chain.signature[-1]
        update_running_stats_(engine, *tensors, momentum)
