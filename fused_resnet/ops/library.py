"""The dispatcher namespace ``fused_resnet`` and what its operations agree on."""

import torch

library = torch.library.Library("fused_resnet", "DEF")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of per-channel statistics and coefficients: float32, or float64 for float64 activations."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def dense(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Return ``x`` without gaps, in channels_last where the kernels take nothing else."""
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) or (x.shape[1] > 1 and x.stride(1) == 1)
    if channels_last or is_channels_last:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def dense_like(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``x`` without gaps and in the memory format of ``y``, which is dense, for kernels that walk both."""
    if x.shape == y.shape and x.stride() == y.stride():
        return x
    if y.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()
