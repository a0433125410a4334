"""Times peers by turns, and says what the times are worth.

A machine's speed drifts, with its clock, its neighbours and its caches; two peers that are measured one after the other
differ by that drift. Here they take turns (A B A B ...), so that each value has a neighbour of the same moment.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

STOCK = "stock"

Values = tuple[float, ...]


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
    peers: Mapping[str, Callable[[], object]], clock: Clock, *, warmup: int, repeats: int
) -> dict[str, Values]:
    """Time every peer `repeats` times, by turns.

    Parameters
    ----------
    peers : mapping of str to callable
        What is timed, by name; every round runs each once, in this order.
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
    seconds: dict[str, list[float]] = {name: [] for name in peers}
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


class Spread(NamedTuple):
    """The median of some values and their quartiles; half of the values lie between `low` and `high`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Quantity:
    """What is measured, and how it is shown.

    Attributes
    ----------
    name
        In the record, with the unit of the values: ``"seconds"``.
    symbol, scale
        The unit of the table, and how many of it one of the record's units is.
    ratio
        What the table calls the comparison with stock.
    stock_on_top
        Whether that is stock over peer (a speed-up) or peer over stock (a part).
    """

    name: str
    symbol: str
    scale: float
    ratio: str
    stock_on_top: bool


SECONDS = Quantity("seconds", "ms", 1e3, "speed-up", stock_on_top=True)
BYTES = Quantity("bytes", "MB", 1e-6, "of stock", stock_on_top=False)


@dataclass(frozen=True)
class Row:
    """One case, measured for every peer.

    Attributes
    ----------
    suite
        Name of the suite.
    case
        What was measured, in words: ``{"shape": "64x56x56", "dtype": "bf16", ...}``.
    engine
        The engine that served the fused peer.
    quantity
        What the values are.
    values
        For every peer its values, round by round; ``stock`` is always among them, unless a result was refused.
    refused
        Which result was wrong, and by how much; such a case has no values.
    """

    suite: str
    case: Mapping[str, str]
    engine: str
    quantity: Quantity
    values: Mapping[str, Values]
    refused: str | None = None

    def spread(self, peer: str) -> Spread:
        """Return a peer's median and quartiles."""
        return Spread.of(self.values[peer])

    def ratio(self, peer: str) -> Spread:
        """Compare a peer with stock, round by round: what slows a whole round down is in both, and cancels."""

        def divide(stock: float, other: float) -> float:
            return stock / other if self.quantity.stock_on_top else other / stock

        return Spread.of(list(map(divide, self.values[STOCK], self.values[peer])))

    def compared(self) -> list[str]:
        """Return the names of the peers that stock is compared with."""
        return [peer for peer in self.values if peer != STOCK]

    def record(self) -> dict[str, Any]:
        """Return the row as plain data, with every value."""
        peers: dict[str, dict[str, Any]] = {
            peer: {**self.spread(peer)._asdict(), "values": list(values)} for peer, values in self.values.items()
        }
        for peer in self.compared():
            peers[peer][self.quantity.ratio] = self.ratio(peer)._asdict()
        return {
            "suite": self.suite,
            "case": dict(self.case),
            "engine": self.engine,
            "quantity": self.quantity.name,
            "peers": peers,
            "refused": self.refused,
        }
