"""Batch norm, ReLU and max pool in one pass, in plain torch: the definition that every engine is tested against.

The stem's widest tensor, the normalised activation in front of the pool, is never written, and the index of a maximum
is one byte: its position in the window, ``row·kernel_w + column``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops.batch_norm_act import reference as batch_norm_act


def batch_norm_act_pool(
    x: Tensor,
    affine: Tensor,
    act: int,
    alpha: float,
    beta: float,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute ``z = maxpool(act(a·x + b))``; returns (z [N, C, OH, OW], index [N, C, OH, OW] uint8).

    The first of equal maxima wins, scanning rows then columns; NaN wins over everything (as stock).
    """
    z = batch_norm_act.batch_norm_act(x, affine, None, None, act, alpha, beta)
    pooled, flat = F.max_pool2d(z, kernel_size, stride, padding, return_indices=True)
    width = x.shape[3]
    row = flat // width - _window_start(pooled.shape[2], stride[0], padding[0], x.device).view(-1, 1)
    column = flat % width - _window_start(pooled.shape[3], stride[1], padding[1], x.device)
    return pooled, (row * kernel_size[1] + column).to(torch.uint8)


def max_pool_backward(
    grad: Tensor, index: Tensor, size: list[int], kernel_size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """Return the gradient of the activation in front of the pool, [N, C, H, W] with ``size`` = (H, W)."""
    position = index.long()
    row = position // kernel_size[1] + _window_start(grad.shape[2], stride[0], padding[0], grad.device).view(-1, 1)
    column = position % kernel_size[1] + _window_start(grad.shape[3], stride[1], padding[1], grad.device)
    flat = (row * size[1] + column).flatten(2)
    wide = grad.double() if grad.dtype is torch.float64 else grad.float()
    result = wide.new_zeros(*grad.shape[:2], size[0] * size[1]).scatter_add_(2, flat, wide.flatten(2))
    # in the memory format of grad: the batch norm behind it walks both tensors side by side
    return _like(result.unflatten(2, size), grad)


def _window_start(windows: int, stride: int, padding: int, device: torch.device) -> Tensor:
    return torch.arange(windows, device=device) * stride - padding


def _like(result: Tensor, grad: Tensor) -> Tensor:
    channels_last = grad.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return result.to(grad.dtype, memory_format=memory_format)
