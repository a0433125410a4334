"""Suite ``ceilings``: the copy bandwidth and the matrix product that every limit is made of."""

from collections.abc import Iterator
from functools import cache

import torch

from fused_resnet.bench.ceilings import Ceilings, measure_copy, measure_matmul
from fused_resnet.bench.harness import make_clock
from fused_resnet.bench.rows import BYTES_PER_SECOND, FLOP_PER_SECOND, Row, Spread, Values
from fused_resnet.bench.settings import Settings

MEASURED, GIVEN = "measured", "given"


def measure_ceilings(settings: Settings) -> Iterator[Row]:
    """Measure both ceilings, unless they are given."""
    yield Row("ceilings", {"ceiling": "copy", "dtype": ""}, "", BYTES_PER_SECOND, _copy(settings))
    for dtype in settings.dtypes:
        yield Row("ceilings", {"ceiling": "matmul", "dtype": dtype}, "", FLOP_PER_SECOND, _matmul(settings, dtype))


def ceilings(settings: Settings, dtype: str) -> Ceilings:
    """Return the medians of what `measure_ceilings` measured; once in a process."""
    copy, matmul = (Spread.of(next(iter(c.values()))).median for c in (_copy(settings), _matmul(settings, dtype)))
    return Ceilings(copy, matmul)


def _copy(settings: Settings) -> dict[str, Values]:
    if settings.copy is not None:
        return {GIVEN: (settings.copy,)}
    return {MEASURED: _measured_copy(settings.device, settings.copy_bytes, settings.op_repeats)}


def _matmul(settings: Settings, dtype: str) -> dict[str, Values]:
    if settings.matmul is not None:
        return {GIVEN: (settings.matmul,)}
    return {MEASURED: _measured_matmul(settings.device, dtype, settings.matmul_size, settings.op_repeats)}


@cache
def _measured_copy(device: torch.device, bytes: int, repeats: int) -> Values:
    return measure_copy(device, make_clock(device), bytes=bytes, repeats=repeats)


@cache
def _measured_matmul(device: torch.device, dtype: str, size: int, repeats: int) -> Values:
    return measure_matmul(device, make_clock(device), dtype, size=size, repeats=repeats)
