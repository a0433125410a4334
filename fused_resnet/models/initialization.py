"""How the weights of convolutions are drawn."""

import functools
from collections.abc import Callable

from torch import Tensor, nn

INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "he_fan_out": functools.partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "he_fan_in": functools.partial(nn.init.kaiming_normal_, mode="fan_in", nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
}


def initialize_convolutions(model: nn.Module, init: str) -> None:
    """Draw the weight of every convolution of a model from a normal distribution, and set its bias to zero.

    Parameters
    ----------
    model : nn.Module
        Whose convolutions are initialized.
    init : str
        With k² the kernel's area: ``"he_fan_out"``, a variance of 2 / (k² out_channels), which keeps the scale of
        gradients, or ``"he_fan_in"``, 2 / (k² in_channels), which keeps that of activations (He et al. 2015,
        arXiv:1502.01852, equations 14 and 10); ``"xavier"``, 2 / (k² (in_channels + out_channels)) (Glorot and
        Bengio 2010, equation 12).

    Raises
    ------
    ValueError
        `init` is none of these.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            INITS[init](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
