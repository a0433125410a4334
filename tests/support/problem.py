"""What the tests of every engine share: random arguments of all operations, and how far a result may be off."""

import torch
from torch import Tensor

from fused_resnet.ops.batch_norm_act import reference
from tests.support.accuracy import rms

EPS = 1e-5

# shape of the activations, how many channels a residual has, and at which it begins: no vector divides them; every
# vector does; the first or the last channels; a vector that the residual has in part; several tiles of channels; a row
# of pixels that is cut short; one pixel
PARTS = [
    ((2, 19, 5, 7), 5, 3),
    ((2, 32, 8, 8), 16, 0),
    ((2, 32, 8, 8), 16, 8),
    ((2, 32, 9, 11), 16, 16),
    ((3, 24, 1, 11), 20, 2),
    ((1, 1040, 4, 4), 1000, 8),
    ((2, 64, 40, 39), 32, 16),
    ((5, 513, 1, 1), 1, 512),
    ((1, 2, 9, 9), 1, 0),
]


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

    def part(self, channels: int, first: int) -> Tensor:
        """Some channels of the residual, dense in its memory format."""
        return torch.empty_like(self.residual[:, :channels]).copy_(self.residual[:, first : first + channels])

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
