"""No figure of a wrong result: what a peer computes is compared with float64 before it is measured."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# group -> name -> tensor; the tensors of a group are alike: outputs, or gradients of parameters, or statistics
Result = Mapping[str, Mapping[str, Tensor]]

OUTPUT, GRADIENT, STATISTIC = "output", "gradient of", "statistic"

# how much worse than stock torch in the same dtype a result may be
FACTOR = 2.0
# sums of float32 in another order; torch.compile's own statistics differ from eager's by as much
ROUNDING = 2e-6
# Where an activation lies within rounding of zero, one peer's ReLU passes its gradient and another's does not: with a
# few such among millions, gradients in float32 have been seen to differ by 0.3 to 0.8 %, stock's no less than others'.
ACROSS_ZERO = 1e-2
# a relative error from which on nothing is right
NO_DIGIT = 1.0


class WrongResult(ArithmeticError):
    """A peer does not compute what stock torch computes."""


def check(peer: str, result: Result, stock: Result, exact: Result, noise: Iterable[Result] = ()) -> None:
    """Compare a result with stock torch's, by their distance to the exact one.

    The distance is the root mean square of the difference over that of the exact tensor. A peer may be `FACTOR` times
    as far from the exact result as stock is, in the same tensor or over the group (the errors of small tensors
    scatter), and `ROUNDING` more; a gradient `ACROSS_ZERO` more. The group does without tensors of which stock has no
    digit right: what is exactly 0, as the gradient of a norm's bias in front of another norm, is known by no rounding.

    Parameters
    ----------
    peer : str
        Who computed `result`, for the message.
    result, stock : mapping
        What the peer and stock torch computed, in one dtype.
    exact : mapping
        The same from the same inputs in float64.
    noise : iterable of mapping
        Draws of the network's own noise, as `fused_resnet.verify` takes them where a tensor is too far off: what stock
        computes from inputs one rounding away.  A peer may be `FACTOR` times as far off as the worst of them.

    Raises
    ------
    WrongResult
        A tensor is too far off, is missing, or holds a NaN; the message names it.
    """
    broken: dict[tuple[str, str], tuple[float, str]] = {}
    for group, exact_tensors in exact.items():
        by_stock = {name: distance(stock[group][name], tensor) for name, tensor in exact_tensors.items()}
        over_group = _root_mean_square([error for error in by_stock.values() if error < NO_DIGIT])
        for name, tensor in exact_tensors.items():
            if name not in result[group]:
                raise WrongResult(f"{peer} is wrong: it has no {group} {name}")
            error = distance(result[group][name], tensor)
            allowance = ROUNDING + (ACROSS_ZERO if group == GRADIENT else 0.0)
            limit = FACTOR * max(by_stock[name], over_group) + allowance
            if not error <= limit:  # a NaN is not
                broken[group, name] = (
                    error,
                    f"{peer} is wrong: {group} {name} is off by {error:.1e}, stock by {by_stock[name]:.1e}, "
                    f"the limit is {limit:.1e}",
                )
    draws = iter(noise)
    while broken and (draw := next(draws, None)) is not None:
        for (group, name), (error, _) in list(broken.items()):
            if error <= FACTOR * distance(draw[group][name], exact[group][name]):
                del broken[group, name]
    for _, message in broken.values():
        raise WrongResult(message)


def _root_mean_square(errors: list[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else 0.0


def distance(tensor: Tensor, exact: Tensor) -> float:
    """Return the relative root mean square error of a tensor."""
    scale = exact.double().square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return float((tensor.double() - exact).square().mean().sqrt() / scale)
