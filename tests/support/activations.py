"""What the tests of every engine's activations share."""

import pytest
from torch import Tensor

from fused_resnet.ops.activation import EXAMPLES, NONE, RELU, Act, Kind

each_act = pytest.mark.parametrize("act", EXAMPLES, ids=str)
# whose gradient is by a value of its own, and by that of x
each_act_and_source = pytest.mark.parametrize(
    ("act", "source"),
    [(act, source) for act in EXAMPLES for source in ("x", "z") if (act, source) != (NONE, "z")],
    ids=lambda value: str(value) if isinstance(value, Act) else f"by {value}",
)


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


def ulps_of(act: Act) -> float:
    """How far an input's gradient may be off: an exponential's last place is magnified by the differences behind it."""
    return 4 if act in (NONE, RELU) else 16
