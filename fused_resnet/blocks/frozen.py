"""Frozen batch norms: layers of other packages that are known by what they hold, and proved by what they compute."""

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

HELD = ("weight", "bias", "running_mean", "running_var")
EPS = 1e-5  # of those that have it in their forward
# what the forward of a frozen norm may name: what it holds, and how tensors of channels become images of them
NAMES = {*HELD, "eps", "reshape", "view", "unsqueeze", "rsqrt", "sqrt"}
TIMM = ("timm.layers.norm_act", "FrozenBatchNormAct2d")  # whose activation is looked for elsewhere


class _Proof(NamedTuple):
    """What the forward of a class was found to be."""

    forward: Callable[..., Any]
    is_frozen: bool


_PROVED: dict[type, _Proof] = {}


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether a module is a batch norm whose statistics and parameters are buffers: torchvision's, or a copy of it.

    A class's forward is read, which may name nothing but the four buffers, an ``eps`` and how they are brought to the
    shape of an image, and is tried on numbers; then each module must hold them and nothing else.
    """
    cls: Any = type(norm)
    proof = _PROVED.get(cls)
    if proof is None or proof.forward is not cls.forward:
        proof = _PROVED[cls] = _Proof(cls.forward, _computes(cls))
    return proof.is_frozen and norm._buffers.keys() == set(HELD) and not norm._parameters


def frozen_eps(norm: Any) -> float:
    """Return what a frozen norm adds to its variance."""
    return float(getattr(norm, "eps", EPS))


def _computes(cls: Any) -> bool:
    """Whether a class's forward computes a frozen norm; what is behind timm's is left out."""
    forward = cls.forward
    is_timms = (cls.__module__, cls.__qualname__) == TIMM
    if type(forward) is not FunctionType or cls.__call__ is not nn.Module.__call__:
        return False
    names = NAMES | {"drop", "act"} if is_timms else NAMES
    if not names >= {*forward.__code__.co_names} >= {*HELD} or forward.__code__.co_freevars or forward.__defaults__:
        return False
    if cls.__getattr__ is not nn.Module.__getattr__ or cls.__getattribute__ is not nn.Module.__getattribute__:
        return False
    if any(isinstance(getattr(cls, name, None), property) for name in (*HELD, "eps")):
        return False
    with torch.no_grad(), _disable_current_modes():  # of which one may have no numbers
        return _gives_what_stock_gives(forward)


def _gives_what_stock_gives(forward: FunctionType) -> bool:
    values = torch.linspace(-1.7, 1.3, 3, dtype=torch.float64, device="cpu")
    held = {"weight": values.sin() + 2, "bias": values.cos(), "running_mean": values * 3, "running_var": values.exp()}
    x = torch.linspace(-5, 5, 36, dtype=torch.float64, device="cpu").view(2, 3, 2, 3)
    uses_eps = "eps" in forward.__code__.co_names
    eps = 0.01 if uses_eps else EPS
    tried = SimpleNamespace(**held, **({"eps": eps} if uses_eps else {}), drop=_itself, act=_itself)
    weight, bias, mean, var = held.values()
    wanted = nn.functional.batch_norm(x, mean, var, weight, bias, eps=eps)
    try:
        got = forward(tried, x)
    except Exception:  # whatever it asks for
        return False
    return isinstance(got, Tensor) and got.shape == x.shape and bool(torch.allclose(got, wanted, rtol=1e-9))


def _itself(x: Tensor) -> Tensor:
    return x
