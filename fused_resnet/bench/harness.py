"""Times peers by turns, and says what the times are worth.

A machine's speed drifts, with its clock, its neighbours and its caches; two peers that are measured one after the other
differ by that drift. Here they take turns (A B A B ...), so that each value has a neighbour of the same moment.
"""

import gc
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from fused_resnet.bench.rows import Values

Peer = TypeVar("Peer", bound=Hashable)


class Clock(Protocol):
    """Something that measures how long a call takes."""

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds that ``run()`` takes."""


class CpuClock:
    """The wall clock."""

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds that ``run()`` takes."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaClock:
    """CUDA events around the work, on the current stream.

    In front of each measurement a buffer twice as large as the L2 cache is overwritten: the work finds its inputs in
    memory, as it does in training, and the host has a head start over the device.
    """

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds between the events."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def make_clock(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def take_turns(
    peers: Mapping[Peer, Callable[[], object]], clock: Clock, *, warmup: int, repeats: int
) -> dict[Peer, Values]:
    """Time every peer `repeats` times, by turns.

    Parameters
    ----------
    peers : mapping to callable
        What is timed, by who it is; every round runs each once, in this order.
    clock : Clock
        What measures a call.
    warmup : int
        Rounds in front whose times are thrown away.
    repeats : int
        Rounds that count.

    Returns
    -------
    For every peer its seconds, round by round.
    """
    seconds: dict[Peer, list[float]] = {name: [] for name in peers}
    with _garbage_kept():
        for _ in range(warmup + repeats):
            for name, run in peers.items():
                seconds[name].append(clock.time(run))
    return {name: tuple(values[warmup:]) for name, values in seconds.items()}


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect garbage before, and not during."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
