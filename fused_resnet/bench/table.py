"""The table of a run in a terminal, a row as soon as it is measured."""

import textwrap
from collections.abc import Sequence
from dataclasses import replace

from fused_resnet.bench.libraries import input_shape, is_of_clips
from fused_resnet.bench.peers import MAX_AUTOTUNE
from fused_resnet.bench.rows import FUSED, SECONDS, Row, Spread
from fused_resnet.bench.settings import Settings
from fused_resnet.bench.suites import Suite

WIDTH = 100  # characters

PEER, VALUE, SPREAD, IMAGES, LIMIT, RATIO, PERCENTILES = 15, 8, 9, 7, 5, 6, 9
COLUMN = 8  # of a peer, where the peers are columns: at the least, or its name
GAP = " "


def fitted(suite: Suite, settings: Settings) -> Suite:
    """Return a suite with a column of networks that is wide enough for those that are measured."""
    if "model" not in suite.columns:
        return suite
    width = max(suite.columns["model"], *map(len, settings.models))
    return replace(suite, columns={**suite.columns, "model": width})


def group_line(suite: Suite, row: Row, previous: Row | None) -> list[str]:
    """Return the line above the first row of a group, where the rows are in groups."""
    group = row.case.get(suite.group)
    new = group is not None and (previous is None or previous.case.get(suite.group) != group)
    return [f"{suite.group} {group}"] if new else []


def heading(suite: Suite, settings: Settings) -> str:
    """Return the lines above a suite's rows, with what all of them have in common."""
    size = f"{settings.image_size}x{settings.image_size}"
    common = f"{suite.name}: {suite.title}; {settings.batch_size} images of {size}"
    if suite.name in ("model", "profile"):
        common += f"; {settings.mode}"
    if "model" in suite.columns:
        common += "".join(
            f"; {name}: clips of {'x'.join(map(str, input_shape(name, settings.image_size)[1:]))}"
            for name in settings.models
            if is_of_clips(name)
        )
    if settings.cuda_graph and suite.name in ("pointwise", "op", "block", "model", "profile"):
        common += "; each peer captured into a CUDA graph"
    cells = [_columns(suite)] if suite.contest else []
    if suite.contest:
        cells.append(f"{'peer':<{PEER}}")
        names = {
            "median": VALUE,
            "p20 p80": SPREAD,
            **_extra(suite),
            "ratio": RATIO,
            "p20-p80": PERCENTILES,
            "fused": RATIO,  # over the peer of the line
        }
        cells += [f"{name:>{width}}" for name, width in names.items()]
    return "\n".join([*textwrap.wrap(common, WIDTH), *([GAP.join(cells)] if cells else [])])


def _columns(suite: Suite) -> str:
    return GAP.join(f"{name:<{width}}" for name, width in suite.columns.items())


def _extra(suite: Suite) -> dict[str, int]:
    """Return the column of a suite that has a limit, or speeds worth a look."""
    return {"limit": LIMIT} if suite.limited else {"img/s": IMAGES} if suite.name == "model" else {}


def lines(suite: Suite, row: Row, *, first: bool = True) -> list[str]:
    """Return the lines of a row: figures, or why there are none.

    Parameters
    ----------
    suite : Suite
        Of the row.
    row : Row
        What was measured.
    first : bool
        Whether the names of the columns go in front where the peers are columns.
    """
    case = GAP.join(f"{row.case[name]:<{width}}" for name, width in suite.columns.items())
    if suite.contest:
        shown = [_contender(suite, row, peer) for peer in row.values]
    else:
        labels = {peer: f"{_label(row, peer):>{COLUMN}}" for peer in row.values}
        head = GAP.join([_columns(suite), *labels.values()])
        values = GAP.join(f"{_figure(row, row.spread(peer).median):>{len(labels[peer])}}" for peer in row.values)
        timed = bool(row.values) and row.quantity is SECONDS
        part = row.part_of_limit(next(iter(row.values))) if timed else None
        reached = "" if part is None else f"  {part:.0%} of the limit"  # by the first peer
        result = [f"{case}{GAP}{values} {row.quantity.symbol}{reached}"] if row.values else []
        return [*([head] if first and row.values else []), *result, *_reasons(row, case if not result else "")]
    result = [f"{case if i == 0 else ' ' * len(case)}{GAP}{line}".rstrip() for i, line in enumerate(shown)]
    return [*result, *_reasons(row, case if not result else "")]


def _reasons(row: Row, case: str) -> list[str]:
    prefix = f"{case.strip()}: " if case.strip() else ""
    texts = (f"  {prefix}refused: {reason}" for reason in row.refused.values())
    return [
        line for text in texts for line in textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    ]


def _contender(suite: Suite, row: Row, peer: str) -> str:
    spread = row.spread(peer)
    cells = [f"{_label(row, peer):<{PEER}}", f"{_figure(row, spread.median):>{VALUE}}"]
    several = len(row.values[peer]) > 1  # what was measured once has no spread
    cells.append(f"{_deviations(spread) if several else '':>{SPREAD}}")
    part = row.part_of_limit(peer)
    figures = {
        "limit": "" if part is None else f"{part:.0%}",
        "img/s": f"{row.images / spread.median:.0f}",
    }
    cells += [f"{figures[name]:>{width}}" for name, width in _extra(suite).items()]
    if peer in row.compared():
        ratio = row.ratio(peer)
        cells.append(f"{f'{ratio.median:.2f}x':>{RATIO}}")
        cells.append(f"{f'{ratio.p20:.2f}-{ratio.p80:.2f}' if several else '':>{PERCENTILES}}")
    else:
        cells.append(" " * (RATIO + len(GAP) + PERCENTILES))
    if FUSED in row.values and peer != FUSED and len(row.values) > 2:
        cells.append(f"{f'{row.ratio(FUSED, peer).median:.2f}x':>{RATIO}}")
    return GAP.join(cells)


def _label(row: Row, peer: str) -> str:
    """Return a peer's name, with its engine, in no more than its column."""
    if peer == MAX_AUTOTUNE:
        return "max-autotune"
    return f"{peer} {row.engine}" if peer == FUSED and len(f"{peer} {row.engine}") <= PEER else peer


def _figure(row: Row, value: float) -> str:
    """Return a value with as many digits as mean something."""
    scaled = value * row.quantity.scale
    return f"{scaled:.3f}" if scaled < 10 else f"{scaled:.2f}" if scaled < 1000 else f"{scaled:.0f}"


def _deviations(spread: Spread) -> str:
    return f"{spread.p20 / spread.median - 1:+.0%} {spread.p80 / spread.median - 1:+.0%}"


def summary(rows: Sequence[Row]) -> str:
    """Return how many peers of how many cases were refused, or nothing."""
    refused = sum(bool(row.refused) for row in rows)
    return f"{refused} of {len(rows)} cases have a refused peer" if refused else ""
