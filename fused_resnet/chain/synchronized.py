"""What the processes of a synchronised batch norm (``torch.nn.SyncBatchNorm``) tell each other.

They normalise by the statistics of all their batches together.  Each unit of a chain asks for one collective in each
direction, of a few numbers for each channel:

========  ==========================================  ==========================================================
forward   all_gather of mean, M2 and count, [2C + 1]  merged by Chan's formula, which is no sum
backward  all_reduce of ΣG, ΣG·(y − mean) and count   ``dy`` takes the sums over the count; dγ and dβ are those of
                                                      this process: DDP averages them like any gradient
========  ==========================================  ==========================================================

The counts stay on the device, so that the host never waits and batches may be of different sizes, and empty, too.

In a chain a process group goes by its name, which a traced program can print.  The collectives are operations of the
dispatcher, so that fake tensors meet only their shapes.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_resnet.ops.library import accumulation_dtype, library


def group_name(norm: nn.SyncBatchNorm) -> str | None:
    """Return the name of the process group that a norm shares its statistics with, or None where it has its own.

    It has its own in eval, in one process, and in a process outside the group: as in stock torch.
    """
    if not norm.training or not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else None


def batch_norm_stats(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: str, k: SimpleNamespace
) -> tuple[Tensor, Tensor]:
    """Compute what the operation ``batch_norm_stats`` does, of the batches of all processes in a group.

    ``y`` is this process's [N, C, H, W], where N may be 0; returns (moments [3, C], affine [2, C]).
    """
    channels = y.shape[1]
    if y.numel() == 0:
        part = y.new_zeros(2 * channels + 1, dtype=accumulation_dtype(y.dtype))
    else:
        count = y.numel() // channels
        mean, var, _ = k.batch_norm_stats(y, None, None, eps)[0]
        part = torch.cat((mean, var * count, mean.new_full((1,), count)))
    parts = torch.ops.fused_resnet.all_gather(part, group)
    moments, affine = k.batch_norm_merge(parts, weight, bias, eps)
    return moments, affine


def mean_sums(sums: Tensor, count: int, group: str) -> Tensor:
    """Return the sums [2, C] of all processes in a group, of ``count`` elements here, over the elements of all."""
    total = torch.cat((sums.flatten(), sums.new_full((1,), count)))
    torch.ops.fused_resnet.all_reduce_(total, group)
    return (total[:-1] / total[-1].clamp_min(1)).view_as(sums)


def _all_gather(x: Tensor, group: str) -> Tensor:
    gathered = _fake_all_gather(x, group)
    # gloo takes an output of one dimension
    dist.all_gather_into_tensor(gathered.view(-1), x, _resolve(group))
    return gathered


def _fake_all_gather(x: Tensor, group: str) -> Tensor:
    return x.new_empty(_resolve(group).size(), x.numel())


def _all_reduce_(x: Tensor, group: str) -> None:
    dist.all_reduce(x, group=_resolve(group))


def _resolve(group: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[attr-defined, arg-type]


library.define("all_gather(Tensor x, str group) -> Tensor")  # [C] of R processes: [R, C]
library.define("all_reduce_(Tensor(a!) x, str group) -> ()")
library.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
library.impl("all_reduce_", _all_reduce_, "CompositeExplicitAutograd")
torch.library.register_fake("fused_resnet::all_gather", _fake_all_gather, lib=library)
torch.library.register_fake("fused_resnet::all_reduce_", lambda x, group: None, lib=library)
