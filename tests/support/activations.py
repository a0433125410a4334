"""What the tests of every engine's activations share."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fused_resnet.ops.activation import EXAMPLES, NONE, RELU, Act, Kind, gradient, value
from fused_resnet.ops.library import accumulation_dtype
from tests.support.accuracy import rms
from tests.support.problem import assert_close

each_act = pytest.mark.parametrize("act", EXAMPLES, ids=str)
# whose gradient is by a value of its own, and by that of x
each_act_and_source = pytest.mark.parametrize(
    ("act", "source"),
    [(act, source) for act in EXAMPLES for source in ("x", "z") if (act, source) != (NONE, "z")],
    ids=lambda value: str(value) if isinstance(value, Act) else f"by {value}",
)

_VALUES = (torch.inf, 3e38, 1e30, 104, 88, 6, 3, 2, 1, 1e-40, 0.0, 1.278, 0.7518)  # the last two are minima, negated
SPECIAL = torch.tensor([*_VALUES, *(-v for v in _VALUES)], dtype=torch.float64)


def assert_special_values(act: Act, v: Tensor, got: Tensor, gradients: Sequence[Tensor]) -> None:
    """Hold what an engine makes of ``SPECIAL`` in its dtype, ``v``, against float64: NaN, infinities, signs of zero."""
    wide = v.double()
    wanted = value(act, wide)
    tolerance = {"rtol": 8 * torch.finfo(v.dtype).eps, "atol": 1e-6, "equal_nan": True}
    torch.testing.assert_close(got.double(), wanted.to(v.dtype).double(), **tolerance)
    signed = ~wanted.isnan() if act != RELU else wanted > 0  # a ReLU's zero has either sign
    assert torch.equal(got.signbit()[signed], wanted.signbit()[signed])
    wanted = gradient(act, torch.ones_like(wide), wide)
    for by in gradients:
        torch.testing.assert_close(by.double(), wanted.to(v.dtype).double(), **tolerance)
        assert by[v.isfinite()].isfinite().all()


def kinks(act: Act) -> tuple[float, ...]:
    """Return where the gradient jumps."""
    kind, alpha, beta = act
    return {
        Kind.RELU: (0.0,),
        Kind.LEAKY_RELU: (0.0,),
        Kind.HARDTANH: (alpha, beta),
        Kind.HARDSWISH: (-3.0, 3.0),
    }.get(Kind(kind), ())


def drop_kinks(grad: Tensor, act: Act, v: Tensor) -> None:
    """Set a gradient to 0 where ``v`` may fall on either side of a kink by its rounding."""
    for kink in kinks(act):
        grad[(v - kink).abs() < 1e-5] = 0


def source_of_mask(act: Act) -> Act:
    """Return the activation of a block's end whose result is its ``z``: a ReLU's serves, else what it is made of."""
    return act if act == RELU else NONE


def assert_gradient_close(
    result: Tensor, expected: Tensor, act: Act, grad: Tensor, coefficients: Tensor | None
) -> None:
    """As ``assert_close`` of ``a·((G − g0) − k·(x − mean))``, or of ``G`` where there are no coefficients.

    The last places of a computed ``G`` stay, though the differences leave little of it: nothing of a batch of one.
    """
    if act in (NONE, RELU):
        assert_close(result, expected)
        return
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    computed = grad if coefficients is None else grad * coefficients[0].view(1, -1, 1, 1)
    last_places = torch.finfo(accumulation_dtype(result.dtype)).eps * rms(computed)
    error = rms(result.double() - expected.double())
    assert error <= 4 * (torch.finfo(result.dtype).eps * rms(expected) + last_places), f"error {error:.3g}"
