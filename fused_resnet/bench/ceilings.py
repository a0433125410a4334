"""The two ceilings of a machine, measured: how fast memory is copied, and how fast matrices are multiplied."""

from dataclasses import dataclass

import torch

from fused_resnet.bench.harness import Clock, take_turns
from fused_resnet.bench.peers import DTYPES
from fused_resnet.bench.rows import Limit, Values

# Parts of the ceilings that real kernels reach side by side: a convolution with its borders and its tails comes to half
# of a large matrix product, a pass over a tensor to most of a copy. Assumed, not measured.
BANDWIDTH_PART, ARITHMETIC_PART = 0.85, 0.5


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at the most.

    Attributes
    ----------
    copy
        Bytes per second of a large copy on the device, those read plus those written.
    matmul
        FLOP per second of a large matrix product in the dtype of the activations.
    """

    copy: float
    matmul: float

    def limit(self, bytes: float, flop: float) -> Limit:
        """Return the least time for so much traffic and arithmetic: each at its ceiling, the longer hides the other."""
        return Limit(bytes, flop, max(bytes / self.copy, flop / self.matmul))


def measure_copy(device: torch.device, clock: Clock, *, bytes: int, repeats: int) -> Values:
    """Return the bytes per second, read plus written, of copies of `bytes` random bytes; one value a copy."""
    source = torch.randint(256, (bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, clock, warmup=2, repeats=repeats)["copy"]
    return tuple(2 * bytes / s for s in seconds)


def measure_matmul(device: torch.device, clock: Clock, dtype: str, *, size: int, repeats: int) -> Values:
    """Return the FLOP per second of products of two random matrices [size, size]; one value a product."""
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    seconds = take_turns({"matmul": lambda: torch.mm(a, b, out=out)}, clock, warmup=2, repeats=repeats)["matmul"]
    return tuple(2 * size**3 / s for s in seconds)
