"""Frozen batch norms: layers of other packages that are known by what they hold, and proved by what they compute."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

HELD = {"weight", "bias", "running_mean", "running_var"}
EPS = 1e-5  # of those that have it in their forward


class _Proof(NamedTuple):
    """What a class was found to be, and the forward that it had then."""

    forward: Callable[..., Any]
    is_frozen: bool


_PROVED: dict[type, _Proof] = {}


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether a module is a batch norm whose statistics and parameters are buffers: torchvision's, or a copy of it.

    Of each class one module is tried, on numbers.  timm's has an activation behind it, which has to be looked for.
    """
    cls = type(norm)
    proof = _PROVED.get(cls)
    if proof is None or proof.forward is not cls.forward:
        proof = _PROVED[cls] = _Proof(cls.forward, _holds(norm) and _computes(norm))
    return proof.is_frozen


def frozen_eps(norm: Any) -> float:
    """Return what a frozen norm adds to its variance."""
    return float(getattr(norm, "eps", EPS))


def _holds(norm: nn.Module) -> bool:
    """Whether a module has the buffers of a frozen norm, [C] each, and nothing else that could be trained."""
    held = dict(norm.named_buffers(recurse=False))
    shapes = {buffer.shape for buffer in held.values()}
    if held.keys() != HELD or len(shapes) != 1 or any(True for _ in norm.parameters()):
        return False
    return len(shapes.pop()) == 1


def _computes(norm: nn.Module) -> bool:
    """Whether a module's forward is a frozen norm's, tried on a copy in float64; what is behind timm's, left out."""
    tried: Any = copy.deepcopy(norm).cpu().double()
    for name in tried._modules:
        setattr(tried, name, nn.Identity())
    channels = tried.weight.shape[0]
    values = torch.linspace(-1.7, 1.3, channels, dtype=torch.float64)
    held = {"weight": values.sin() + 2, "bias": values.cos(), "running_mean": values * 3, "running_var": values.exp()}
    for name, value in held.items():
        getattr(tried, name).copy_(value)
    x = torch.linspace(-5, 5, 12 * channels, dtype=torch.float64).view(2, channels, 2, 3)
    wanted = nn.functional.batch_norm(
        x, held["running_mean"], held["running_var"], held["weight"], held["bias"], eps=frozen_eps(norm)
    )
    try:
        with torch.no_grad():
            got = tried(x)
    except Exception:  # whatever it asks for
        return False
    return isinstance(got, torch.Tensor) and got.shape == x.shape and bool(torch.allclose(got, wanted, rtol=1e-9))
