"""What a run measures, and how often."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fused_resnet import engines
from fused_resnet.bench.peers import DTYPES, STOCK_PEER, Peer
from fused_resnet.bench.rows import FUSED, STOCK

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """What a run measures, and how often.

    Attributes
    ----------
    models
        Networks of every suite but ``op`` and ``ceilings``.
    acts
        Activations of ``op``, names of `ops.activation.BY_NAME`.
    batch_size, image_size
        Of every suite; the shapes of ``op`` are those of a ResNet-50 on such images.
    dtypes
        Names of `peers.DTYPES`.
    device
        Where everything runs.
    engines
        Of the fused peer; each gets a row of its own, all take turns with the other peers.
    peers
        Names of `peers.NAMES` that are compared with stock.
    mode
        ``"train"`` or ``"eval"``, of the suites ``model`` and ``profile``.
    cuda_graph
        Whether what is timed is captured into a CUDA graph, for every peer.
    op_repeats, model_repeats
        Rounds that count; blocks have those of ``op``.
    largest_only
        Only one shape for each kind of shortcut, and the first block.
    copy, matmul
        The ceilings in bytes and FLOP per second; None where they are to be measured.
    copy_bytes, matmul_size
        Of the copy and of the matrices that measure them.
    trace
        Where the suite ``profile`` writes Chrome traces, one for each peer; or None.
    """

    models: tuple[str, ...] = ("resnet18", "resnet50")
    acts: tuple[str, ...] = ("relu",)
    batch_size: int = 8
    image_size: int = 224
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    device: torch.device = CPU
    engines: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = (FUSED,)
    mode: str = "train"
    cuda_graph: bool = False
    op_repeats: int = 30
    model_repeats: int = 10
    largest_only: bool = False
    copy: float | None = None
    matmul: float | None = None
    copy_bytes: int = 2**28
    matmul_size: int = 1024
    trace: Path | None = None

    @classmethod
    def on(cls, device: torch.device) -> "Settings":
        """Return the defaults of a device: on a GPU the sizes are such that its caches hold little of them."""
        if device.type == "cpu":
            return cls(device=device)
        return cls(device=device, batch_size=256, dtypes=("bf16", "fp16"), copy_bytes=2**32, matmul_size=8192)

    def quick(self) -> "Settings":
        """Return settings that show in seconds whether everything works; their figures mean little."""
        return replace(
            self,
            models=("resnet20",),
            batch_size=8,
            image_size=32,
            op_repeats=3,
            model_repeats=3,
            largest_only=True,
            copy_bytes=2**20,
            matmul_size=64,
        )

    def serving_engines(self, dtype: str) -> tuple[str, ...]:
        """Return the engines that serve the fused peer; an EngineError says why one that was asked for cannot."""
        chosen = (engines.choose(engine, self.device.type, DTYPES[dtype]) for engine in self.engines)
        return tuple(dict.fromkeys(chosen))

    def contenders(self, dtype: str) -> list[Peer]:
        """Return all who are measured, stock first, the fused peer once for each engine."""
        others = (name for name in self.peers if name != STOCK)
        named = [[Peer(FUSED, e) for e in self.serving_engines(dtype)] if n == FUSED else [Peer(n)] for n in others]
        return [STOCK_PEER, *(peer for peers in named for peer in peers)]
