"""What a run measured: one row for each case, with every value of every peer."""

import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STOCK, FUSED = "stock", "fused"
# of single convolutions: PyTorch's own between an engine's norm kernels, and the products of matrices that they are
TORCH, MATMUL = "torch", "matmul"

Values = tuple[float, ...]


def base_of(peers: Container[str]) -> str:
    """Return who of some peers the others are compared with: stock, or PyTorch's parts of it where it is not there."""
    return STOCK if STOCK in peers else TORCH


class Spread(NamedTuple):
    """The median of some values and their 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), p20, p80)


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
        What the table calls the comparison with another peer.
    base_on_top
        Whether that is the other over the peer (a speed-up) or the peer over the other (a part).
    """

    name: str
    symbol: str
    scale: float
    ratio: str = ""
    base_on_top: bool = False


SECONDS = Quantity("seconds", "ms", 1e3, "speed-up", base_on_top=True)
# of a class of kernels, which one peer may not have: no ratios
PROFILED_SECONDS = Quantity("profiled seconds", "ms", 1e3)
BYTES = Quantity("bytes", "MB", 1e-6, "of stock")
BYTES_PER_SECOND = Quantity("bytes per second", "GB/s", 1e-9)
FLOP_PER_SECOND = Quantity("FLOP per second", "TFLOP/s", 1e-12)
IMAGES_PER_SECOND = Quantity("images per second", "img/s", 1)

QUANTITIES = {
    quantity.name: quantity
    for quantity in (SECONDS, PROFILED_SECONDS, BYTES, BYTES_PER_SECOND, FLOP_PER_SECOND, IMAGES_PER_SECOND)
}


class Limit(NamedTuple):
    """What a case costs at the least: its bytes and its arithmetic, and the seconds they take at the ceilings."""

    bytes: float
    flop: float
    seconds: float


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
        The engine that served the fused peer, or empty where there is none.
    quantity
        What the values are.
    values
        For every peer its values, round by round; a peer whose result was refused has none.
    refused
        For every peer without values the reason: its result is wrong, or it could not run.
    limit
        The least that the case costs; None where nothing was counted.
    images
        Images of one call, or 0.
    """

    suite: str
    case: Mapping[str, str]
    engine: str
    quantity: Quantity
    values: Mapping[str, Values]
    refused: Mapping[str, str] = field(default_factory=dict)
    limit: Limit | None = None
    images: int = 0

    def spread(self, peer: str) -> Spread:
        """Return a peer's median and percentiles."""
        return Spread.of(self.values[peer])

    def ratio(self, peer: str, base: str | None = None) -> Spread:
        """Compare a peer with another, round by round: what slows a whole round down is in both, and cancels."""
        pairs = zip(self.values[peer], self.values[base or base_of(self.values)], strict=True)
        return Spread.of([b / p if self.quantity.base_on_top else p / b for p, b in pairs])

    def compared(self) -> list[str]:
        """Return the names of the peers that are compared with the one that is the base."""
        base = base_of(self.values)
        return [peer for peer in self.values if peer != base] if base in self.values and self.quantity.ratio else []

    def part_of_limit(self, peer: str) -> float | None:
        """Return how much of the fastest possible speed a peer reaches; above 1 where a cache serves what is read."""
        return None if self.limit is None else self.limit.seconds / self.spread(peer).median

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
            "refused": dict(self.refused),
            "limit": None if self.limit is None else self.limit._asdict(),
            "images": self.images,
        }

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Row":
        """Return the row that `record` describes; medians and ratios are made from the values again."""
        refused = record["refused"] or {}
        limit = record.get("limit")  # format 1 has neither limit nor images, and one reason for the whole row
        return cls(
            record["suite"],
            record["case"],
            record["engine"],
            QUANTITIES[record["quantity"]],
            {peer: tuple(measured["values"]) for peer, measured in record["peers"].items()},
            {FUSED: refused} if isinstance(refused, str) else refused,
            None if limit is None else Limit(**limit),
            record.get("images", 0),
        )
