"""The rule of accuracy, which has no hand-picked tolerance.

A fused result's distance to float64 (root mean square) is at most ``FACTOR`` times stock PyTorch's in the same dtype,
plus ``ULPS`` units in the last place of the result's own dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2
ULPS = 4


class Errors(NamedTuple):
    """Root mean squares: fused's and stock's distance to the exact result, its own size, and that size's last place."""

    fused: float
    stock: float
    exact: float
    ulp: float


def rms(t: Tensor) -> float:
    """Root mean square."""
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def allowed_error(stock: float, ulp: float) -> float:
    """Return how far a fused result may be from float64 where stock is as far as ``stock``."""
    return FACTOR * stock + ULPS * ulp


def measure(fused: Tensor | None, stock: Tensor | None, exact: Tensor | None) -> Errors | str | None:
    """Return a result's errors, or in what it is unlike stock's whatever its errors, or None where there are none.

    NaN on any side is unlike; so is another shape, dtype or device, or a tensor where stock has none; and integers must
    be equal.
    """
    if fused is None or stock is None or exact is None:
        missing = [name for name, t in (("fused", fused), ("stock", stock), ("exact", exact)) if t is None]
        return f"{', '.join(missing)} has none" if len(missing) < 3 else None
    if fused.shape != stock.shape or fused.dtype != stock.dtype or fused.device != stock.device:
        ours, theirs = (f"{tuple(t.shape)} {t.dtype} {t.device}" for t in (fused, stock))
        return f"{ours}, stock has {theirs}"
    if not fused.is_floating_point():
        if torch.equal(fused, stock):
            return None
        unequal = f"{int((fused != stock).sum())} of {fused.numel()} elements differ from stock's"
        return f"{fused.item()}, stock has {stock.item()}" if fused.numel() == 1 else unequal
    f, s, e = (t.detach().to_dense().double() for t in (fused, stock, exact))
    nan = [name for name, t in (("fused", f), ("stock", s), ("exact", e)) if t.isnan().any()]
    if nan:
        return f"NaN in {', '.join(nan)}"
    error, stock_error = (rms(torch.where(t == e, 0.0, t - e)) for t in (f, s))  # equal infinities are no error
    size = rms(e[e.isfinite()])
    return Errors(error, stock_error, size, torch.finfo(fused.dtype).eps * size)


def gradient_for(output: Tensor) -> Tensor:
    """Return a gradient that depends on the shape alone, and that every floating-point dtype holds exactly."""
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    like = torch.empty_like(output, dtype=torch.bfloat16).copy_(noise)
    return like.to(output.dtype)


def one_rounding_away(t: Tensor, dtype: torch.dtype | None, seed: int) -> Tensor:
    """Return an input of which a random half has moved by a unit in the last place, or by autocast's rounding."""
    unit = max(torch.finfo(t.dtype).eps, torch.finfo(dtype or t.dtype).eps / 2)
    some = torch.rand(t.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(some.to(t.device), t * (1 + unit), t)
