"""Batch norm, activation and max pool in one pass, and the pool's backward from one-byte indices."""

import torch
from torch import Tensor

from fused_resnet.ops.activation import SCHEMA as ACT
from fused_resnet.ops.batch_norm_act_pool import reference

__all__ = ["OPERATIONS", "reference"]


def _fake_pool(
    x: Tensor,
    affine: Tensor,
    act: int,
    alpha: float,
    beta: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    pooled = torch.nn.functional.max_pool2d(x, kernel_size, stride, padding)
    return pooled, torch.empty_like(pooled, dtype=torch.uint8)


def _fake_pool_backward(
    grad: Tensor, index: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    channels_last = grad.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((*grad.shape[:2], *size), dtype=grad.dtype, device=grad.device, memory_format=memory_format)


# name -> (schema, fake)
OPERATIONS = {
    "batch_norm_act_pool": (
        f"(Tensor x, Tensor affine, {ACT}, int[] kernel_size, int[] stride, int[] padding) -> (Tensor, Tensor)",
        _fake_pool,
    ),
    "max_pool_backward": (
        "(Tensor grad, Tensor index, SymInt[] size, int[] kernel_size, int[] stride, int[] padding) -> Tensor",
        _fake_pool_backward,
    ),
}
