"""What the tests of every engine share: random arguments of all operations, and how far a result may be off."""

import torch
from torch import Tensor

from fused_resnet.ops.batch_norm_act import reference
from tests.accuracy import rms

EPS = 1e-5


def moments_of(x: Tensor) -> Tensor:
    return reference.batch_norm_stats(x, None, None, EPS)[0]


class Problem:
    """Activations of one shape, with per-channel tensors from the reference."""

    def __init__(self, x: Tensor, residual: Tensor, grad: Tensor) -> None:
        self.x, self.residual, self.grad = x, residual, grad
        self.count = x.numel() // x.shape[1]
        self.weight, self.bias = torch.randn(2, x.shape[1]).to(x.device).unbind()
        self.moments, self.affine = reference.batch_norm_stats(x, self.weight, self.bias, EPS)
        self.residual_moments, self.residual_affine = reference.batch_norm_stats(residual, self.weight, None, EPS)

    def coefficients(self, sums: Tensor, branch: int, batch_stats: bool = True) -> Tensor:
        moments = self.residual_moments if branch else self.moments
        return reference.batch_norm_coefficients(sums, branch, moments, self.weight, EPS, self.count, batch_stats)[2]


def assert_close(result: Tensor, expected: Tensor, ulps: float = 4) -> None:
    """Relative RMS error of a few units in the last place; same shape, dtype and NaN."""
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(result.isnan(), expected.isnan())
    result, expected = result.nan_to_num(), expected.nan_to_num()
    error = rms(result.double() - expected.double())
    assert error <= ulps * torch.finfo(result.dtype).eps * rms(expected), f"error {error:.3g} of {rms(expected):.3g}"
