"""What the suites share: who is let in, the capture into graphs, and the rows of a contest."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from fused_resnet.bench.accuracy import Result, WrongResult, check
from fused_resnet.bench.graphs import capture
from fused_resnet.bench.peers import EXACT_PEER, STOCK_PEER, Peer
from fused_resnet.bench.rows import FUSED, SECONDS, Limit, Quantity, Row, Values

Runs = Mapping[Peer, Callable[[], object]]
T = TypeVar("T")


class Contender(Protocol):
    """Something whose result can be checked."""

    def result(self) -> Result:
        """Return all that it computes."""


def refusals(
    make: Callable[[Peer], Contender],
    peers: Sequence[Peer],
    noise: Callable[[], Iterable[Result]] = tuple,
) -> dict[Peer, str]:
    """Run every peer once and return those that get no figure, each with the reason.

    Parameters
    ----------
    make : callable
        Returns what a peer runs; one lives at a time.
    peers : sequence of Peer
        Who is checked against float64; stock is the measure, and never refused.
    noise : callable
        Returns draws of the noise of what is run, see `fused_resnet.bench.accuracy.check`; default: none.
    """
    # cuDNN's search for its fastest algorithm is not worth it for one step in float64
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        exact = make(EXACT_PEER).result()
    stock = make(STOCK_PEER).result()
    refused: dict[Peer, str] = {}
    for peer in peers:
        if peer == STOCK_PEER:
            continue
        try:
            check(str(peer), make(peer).result(), stock, exact, noise())
        except WrongResult as error:
            refused[peer] = str(error)
        except Exception as error:  # one that cannot compile or has no memory must not cost the others their figures
            refused[peer] = cannot_run(peer, error)
    return refused


def cannot_run(peer: Peer, error: Exception) -> str:
    """Return in one line why a peer has no figure."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{peer} cannot run: {type(error).__name__}: {first_line}"


def of_each(peers: Iterable[Peer], refused: dict[Peer, str], make: Callable[[Peer], T]) -> dict[Peer, T]:
    """Return what `make` gives for every peer that is not refused; where it fails, the peer is added to `refused`."""
    made = {}
    for peer in peers:
        if peer not in refused:
            try:
                made[peer] = make(peer)
            except Exception as error:  # out of memory, or not to be captured
                refused[peer] = cannot_run(peer, error)
    return made


def capture_all(runs: Runs, device: torch.device, refused: dict[Peer, str]) -> Runs:
    """Capture what every peer runs and return the replays; who cannot be captured is added to `refused`."""
    return of_each(runs, refused, lambda peer: capture(runs[peer], device))


def rows_by_engine(
    suite: str,
    case: Mapping[str, str],
    peers: Sequence[Peer],
    values: Mapping[Peer, Values],
    refused: Mapping[Peer, str],
    *,
    quantity: Quantity = SECONDS,
    limit: Limit | None = None,
    images: int = 0,
) -> Iterator[Row]:
    """Yield a row for each engine of the fused peer; they share what the other peers measured beside it."""
    for engine in [peer.engine for peer in peers if peer.name == FUSED] or [""]:
        shown = [peer for peer in peers if peer.engine in ("", engine)]
        yield Row(
            suite,
            case,
            engine,
            quantity,
            {peer.name: values[peer] for peer in shown if peer in values},
            {peer.name: refused[peer] for peer in shown if peer in refused},
            limit,
            images,
        )
