"""The dispatcher namespace ``fused_resnet`` and what its operations agree on."""

import torch

library = torch.library.Library("fused_resnet", "DEF")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of per-channel statistics and coefficients: float32, or float64 for float64 activations."""
    return torch.float64 if dtype is torch.float64 else torch.float32
