"""What a verification found: a row for each tensor, held against the rule of accuracy."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fused_resnet.verification.accuracy import FACTOR, ULPS, Errors, allowed_error, measure

# rows that a report shows although nothing is wrong with them
WORST = 5
# Where an output of stock's is farther from float64 than this, of its own size, the two computed different things:
# random numbers that depend on the dtype, or a precision in which nothing is left of the result.
UNRELATED = 0.1


class Row(NamedTuple):
    """One line of a report.

    Errors are relative to the exact result's root mean square (absolute where that is 0), None where nothing has one.
    ``noise`` is stock's with inputs one rounding away, measured where the rule is broken.
    """

    name: str
    ok: bool
    note: str = ""
    fused: float | None = None
    stock: float | None = None
    allowed: float | None = None
    noise: float | None = None

    def __str__(self) -> str:
        numbers = (self.fused, self.stock, self.allowed, self.noise)
        columns = "".join(f"{'' if number is None else f'{number:.2e}':>10}" for number in numbers)
        return f"{columns}  {'' if self.ok else 'BROKEN '}{self.note}".rstrip()


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; prints as a table of the worst rows and of all broken ones.

    Parameters
    ----------
    rows
        Every output, every gradient of an input or parameter, every buffer, and the types of the outputs.
    chains
        How many chains were fused: with 0 of them, stock was compared with stock.
    """

    rows: tuple[Row, ...]
    chains: int

    @property
    def ok(self) -> bool:
        """Whether no row breaks the rule."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        compared = [row for row in self.rows if row.fused is not None and row.allowed is not None]
        worst = sorted(compared, key=lambda row: (row.fused or 0.0) / (row.allowed or math.inf), reverse=True)[:WORST]
        return self._table([row for row in self.rows if row.note or not row.ok or row in worst])

    def table(self) -> str:
        """Return the table of all rows."""
        return self._table(list(self.rows))

    def _table(self, rows: list[Row]) -> str:
        chains = f"{self.chains} chains" if self.chains else "nothing is fused"
        rule = f"within {FACTOR} × stock's error + {ULPS} units in the last place"
        broken = sum(not row.ok for row in self.rows)
        by_noise = sum(row.ok and row.noise is not None for row in self.rows)
        count = f"{len(self.rows)} results" if self.ok else f"{broken} of {len(self.rows)} results not"
        head = f"{'ok' if self.ok else 'NOT ok'}: {chains}, {count} {rule}"
        head += f", {by_noise} {'of them' if self.ok else 'others'} by the network's own noise" if by_noise else ""
        width = max((len(row.name) for row in rows), default=0)
        names = "".join(f"{name:>10}" for name in ("fused", "stock", "allowed", "own noise"))
        return "\n".join([head, f"  {'':<{width}}{names}", *(f"  {row.name:<{width}}{row}".rstrip() for row in rows)])


def row_of(name: str, fused: Tensor | None, stock: Tensor | None, exact: Tensor | None) -> Row:
    """Hold one tensor against the rule."""
    if (fused is None) != (stock is None):
        what = "gradient" if name.endswith(".grad") else "such tensor"
        note = f"stock has no {what}, fused has" if stock is None else f"fused has no {what}, stock has"
        return Row(name, False, note)
    try:
        errors = measure(fused, stock, exact)
    except Exception as error:  # a kind of tensor that torch cannot subtract
        errors = f"cannot be compared: {said(error)}"
    if not isinstance(errors, Errors):
        return Row(name, errors is None, errors or "")
    scale = errors.exact or 1.0
    allowed = allowed_error(errors.stock, errors.ulp)
    ok = errors.fused <= allowed
    note = "" if ok else "less accurate than stock"
    if ok and name.startswith("output") and not errors.stock <= UNRELATED * scale:
        note = "stock itself is far from float64 (other random numbers?): this says little"
    return Row(name, ok, note, errors.fused / scale, errors.stock / scale, allowed / scale)


def with_noise(row: Row, draw: float | None) -> Row:
    """Hold a row that breaks the rule against one more draw of the network's own noise."""
    if row.ok or row.fused is None or draw is None:
        return row
    noise = max(draw, row.noise or 0.0)
    ok = row.fused <= FACTOR * noise
    return row._replace(ok=ok, note="within the network's own noise" if ok else row.note, noise=noise)


def failed(chains: int, note: str, ok: bool = False) -> Verification:
    """Report a step that did not come to its end."""
    return Verification((Row("a step", ok, note),), chains)


def said(error: Exception) -> str:
    """Return what an exception says, with its class."""
    return f"{type(error).__name__}: {error}"
