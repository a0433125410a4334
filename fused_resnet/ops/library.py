"""The dispatcher namespace ``fused_resnet`` and what its operations agree on."""

import torch

library = torch.library.Library("fused_resnet", "DEF")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of per-channel statistics and coefficients: float32, or float64 for float64 activations."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def dense(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Return ``x`` without gaps, in channels_last where the kernels take nothing else."""
    if channels_last or is_channels_last(x) or (x.shape[1] > 1 and x.stride(1) == 1):
        return _to_channels_last(x)
    return x.contiguous()


def dense_like(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``x`` without gaps and in the memory format of ``y``, which is dense, for kernels that walk both."""
    if x.shape == y.shape and x.stride() == y.stride():
        return x
    return _to_channels_last(x) if is_channels_last(y) else x.contiguous()


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the pixels of ``x`` are the rows of a matrix without gaps, as :func:`rows` shows them."""
    if x.dim() == 3:
        return x.unsqueeze(3).is_contiguous(memory_format=torch.channels_last)
    return x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()])


def _to_channels_last(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 3:
        return x.unsqueeze(3).contiguous(memory_format=torch.channels_last).squeeze(3)
    return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return the pixels of an activation [N, C, H, W] as the rows of a matrix [N·H·W, C], a view in channels_last."""
    return x.movedim(1, 3).flatten(0, 2)


def image(x: torch.Tensor) -> torch.Tensor:
    """Return a dense sequence [N, C, L] or volume [N, C, D, H, W] as an image of the same pixels, a view."""
    if x.dim() == 3:
        return x.unsqueeze(3)
    n, channels, depth, height, width = x.shape
    return x.view(n, channels, depth * height, width)
