"""Who is compared: stock PyTorch, eagerly and compiled, this package in every way to fuse a network, and timm.

All get the same random inputs, weights and settings, channels_last; ``exact`` is stock in float64 and is never timed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_resnet.bench.rows import FUSED, STOCK
from fused_resnet.surgery import fuse

LEAN, STAGE, LEAN_STAGE = "lean", "stage", "lean-stage"
COMPILED, MAX_AUTOTUNE, TIMM = "compile", "compile-max-autotune", "timm"
COMPILING = (COMPILED, MAX_AUTOTUNE)

# those that are this package, and how each is fused
FUSINGS: dict[str, dict[str, str]] = {
    FUSED: {},
    LEAN: {"memory": "lean"},
    STAGE: {"chain": "stage"},
    LEAN_STAGE: {"memory": "lean", "chain": "stage"},
}

# what --peers takes; stock is always measured, since all are compared with it
NAMES = (STOCK, *FUSINGS, COMPILED, MAX_AUTOTUNE, TIMM)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Peer(NamedTuple):
    """Who computes.

    Attributes
    ----------
    name
        One of `NAMES`, or ``"exact"``.
    engine
        Of the fused peers; empty for the others, and for the one that is chosen.
    """

    name: str
    engine: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.engine}".rstrip()


STOCK_PEER, EXACT_PEER = Peer(STOCK), Peer("exact")


def fused(peer: Peer, module: nn.Module) -> None:
    """Fuse a module for the peers that are this package."""
    if peer.name in FUSINGS:
        fuse(module, engine=peer.engine or "auto", **FUSINGS[peer.name])  # type: ignore[arg-type]


def compiled(peer: Peer, function: Callable[..., Any], *, graphed: bool = False) -> Callable[..., Any]:
    """Return a function or module as a peer calls it: under ``torch.compile`` for those that compile.

    Parameters
    ----------
    peer : Peer
        Who computes.
    function : callable
        Stock's.
    graphed : bool
        Whether its calls will be captured into a CUDA graph; then torch.compile must not make graphs of its own.
    """
    if peer.name not in COMPILING:
        return function
    mode = None
    if peer.name == MAX_AUTOTUNE:
        mode = "max-autotune-no-cudagraphs" if graphed else "max-autotune"
    # in full: where Dynamo gives up (eight versions of one function) it would silently time stock
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def forget_compiled() -> None:
    """Let Dynamo forget what it compiled for earlier cases, which counts against its limit of versions."""
    torch._dynamo.reset()
